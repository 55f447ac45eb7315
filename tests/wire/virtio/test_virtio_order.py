"""What the barrier is made of; that it works is shown by test_virtqueue_notifications, with another process."""

from blkferry.wire.virtio.order import Fence


def test_a_fence_can_be_passed_for_ever():
    for weak in (True, False):
        fence = Fence(weak=weak)
        for _ in range(3):
            fence.full()
            fence.light()


def test_only_strong_machines_save_the_light_one():
    weak, strong = Fence(weak=True), Fence(weak=False)
    assert weak.light == weak.full
    assert strong.light != strong.full
