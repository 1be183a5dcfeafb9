# SPDX-License-Identifier: Apache-2.0
"""fgattn_cute inside other people's libraries; each integration is imported by its own name.

``fgattn_cute.integrations.diffusers`` makes the self-attention of video transformers sparse.
"""
