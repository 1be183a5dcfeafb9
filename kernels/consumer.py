# SPDX-License-Identifier: Apache-2.0
"""Consumer role: work item after work item through the main loop and the epilogue."""

import cutlass.cute as cute
from cutlass import Int32, const_expr

from .scheduler import Walker


class Consumer(Walker):
    def __init__(self, spec, scheduler, mainloop, epilogue):
        self.spec = spec
        self.scheduler, self.mainloop, self.epilogue = scheduler, mainloop, epilogue

    @cute.jit
    def run(self):
        """All items of this CTA."""
        self.mainloop.order.start(self.mainloop.warpgroup_index)
        self.walk()
        if const_expr(self.spec.takes_several):
            self.epilogue.wait_stored()

    @cute.jit
    def take(self, index: Int32, tiles: Int32, items: Int32):
        """tiles and items count what this consumer has taken from the pipes."""
        work = self.scheduler.fetch(index)
        self.mainloop.reset()
        if work.num_keys > 0:
            tiles = self.mainloop.attend(work, tiles, items)
            items += 1
        self.epilogue.store(work, self.mainloop.acc_O, self.mainloop.softmax)
        if const_expr(self.spec.redo):
            if work.num_keys > 0:  # O went out through Q's slab
                self.epilogue.wait_stored()
                self.mainloop.pipe_q.release(items - 1)
        return tiles, items
