"""What a check of an image has found, in the words and numbers of `qemu-img check`."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_MESSAGES = 200
"""Findings told in words; further ones are only counted, for a broken image may have millions."""


@dataclass(slots=True)
class CheckResult:
    """Numbers as in QEMU's ImageCheck; `corruptions` and `leaks` are those that are (still) there.

    `messages` tells the first findings in words. With `modified` the file was changed: whoever has it open must read
    its header and tables again.
    """

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = field(default_factory=list)
    modified: bool = False

    @property
    def clean(self) -> bool:
        return not (self.corruptions or self.leaks or self.check_errors)

    def corrupt(self, message: str, times: int = 1) -> None:
        self.corruptions += times
        self.tell(f"ERROR {message}")

    def leak(self, message: str) -> None:
        self.leaks += 1
        self.tell(f"Leaked {message}")

    def fail(self, message: str) -> None:
        """Something could not be checked."""
        self.check_errors += 1
        self.tell(f"ERROR {message}")

    def tell(self, message: str) -> None:
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)
        elif len(self.messages) == MAX_MESSAGES:
            self.messages.append("(more is not listed)")
