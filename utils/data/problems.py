"""What is wrong with a data set, counted and named: one `Problem` per file and kind, gathered in a `Report`."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from utils.core.errors import UserError

LEFT_OUT, DROPPED, CLIPPED, USED = "image left out", "box dropped", "box clipped", "used as it is"
REMOVED, NOT_READ, STOPS = "counted once", "not read", "train.py and val.py stop at it"

KINDS = {
    "image-missing": "image not found",
    "image-unreadable": "unreadable image",
    "image-truncated": "image file ends too early",
    "image-suffix": "image under a suffix that is no image's",
    "image-misnamed": "image of another format than its suffix says",
    "image-repeated": "image listed more than once",
    "image-tiny": "image under 10 px",
    "folder-repeated": "link to a folder that is read already",
    "folder-unreadable": "unreadable folder",
    "label-unreadable": "unreadable label file",
    "label-shared": "label file shared by several images",
    "label-orphan": "label file without an image",
    "label-format": "malformed label",
    "label-class": "class number out of range",
    "box-overhang": "box slightly over the image's edge",
    "box-outside": "box outside the image",
    "box-empty": "box without area",
    "box-repeated": "same box twice",
    "coco-record": "malformed record in a COCO file",
    "coco-repeated": "id or file name used twice in a COCO file",
    "coco-reference": "annotation of an unknown image or category",
    "coco-size": "image of another size than its COCO record",
    "coco-rotated": "COCO record made before EXIF rotation",
    "voc-class": "class that is not among the names",
}
KEPT = 20_000  # problems kept with their file names; all are counted
LINES_KEPT, LINES_SHOWN = 1000, 5  # line numbers of one problem


def spelled_out(text: str) -> str:
    """Text from file names and labels, safe to print: line breaks, control codes and broken UTF-8 are spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One kind of trouble in one file; `detail` is about its first occurrence."""

    kind: str
    file: str
    action: str
    detail: str
    lines: tuple[int, ...] = ()  # where it shows, at most LINES_KEPT of them, in order; none where lines mean nothing
    count: int = 1
    images: int = 1  # how many are left out, where that is the action

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(self.lines))  # JSON gives lists

    @property
    def where(self) -> str:
        """The file, and the first line where there is one."""
        return f"{self.file}:{self.lines[0]}" if self.lines else self.file

    def __str__(self) -> str:
        more = ""
        if self.count > 1:
            others = self.lines[1 : LINES_SHOWN + 1]
            dots = ", ..." if len(self.lines) > LINES_SHOWN + 1 else ""
            lines = f", line{'s' * (len(others) > 1)} {', '.join(map(str, others))}{dots}" if others else ""
            more = f" (and {self.count - 1} more in this file{lines})"
        return spelled_out(f"{self.where} {self.detail}{more}: {self.action}")


@dataclass
class Report:
    """Counts of one split, what was done to what, and the problems by file."""

    images: int = 0  # found or listed
    used: int = 0
    labeled: int = 0  # used images with at least one box
    without_file: int = 0  # used images without a label file or entry: background
    boxes: int = 0  # without crowd regions
    crowds: int = 0
    counts: dict[str, int] = field(default_factory=dict)  # kind -> occurrences
    actions: dict[str, int] = field(default_factory=dict)  # action -> occurrences, for LEFT_OUT images
    problems: list[Problem] = field(default_factory=list)  # at most KEPT

    def add(self, problems: Iterable[Problem]) -> None:
        """Count problems, each once (images that share a label file share its problems), and keep the first KEPT."""
        known = set(self.problems)
        for problem in problems:
            if problem in known:
                continue
            known.add(problem)
            self.counts[problem.kind] = self.counts.get(problem.kind, 0) + problem.count
            done = problem.images if problem.action == LEFT_OUT else problem.count
            self.actions[problem.action] = self.actions.get(problem.action, 0) + done
            if len(self.problems) < KEPT:
                self.problems.append(problem)

    def of(self, kind: str) -> list[Problem]:
        """The kept problems of one kind."""
        return [problem for problem in self.problems if problem.kind == kind]

    def lines(self, examples: int = 1) -> list[str]:
        """The summary: a line of counts, then a line per kind of problem with `examples` of it."""
        background = self.used - self.labeled
        text = f"{self.used:,} images ({background:,} without a box), {self.boxes:,} boxes"
        if self.crowds:
            text += f", {self.crowds:,} crowd regions"
        lines = [text]
        for kind, count in sorted(self.counts.items(), key=lambda item: -item[1]):
            shown = self.of(kind)[:examples]
            lines += [f"  {count:,} x {KINDS[kind]}, e.g. {shown[0]}" if shown else f"  {count:,} x {KINDS[kind]}"]
            lines += [f"      {problem}" for problem in shown[1:]]
        return lines

    def to_json(self) -> str:
        """As JSON text (see `from_json`)."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(**{**data, "problems": [Problem(**problem) for problem in data["problems"]]})


def refuse(problems: list[Problem], total: int, expected: str) -> UserError:
    """The one-line error for problems that stop a run: the first ten places, and how many there are."""
    shown = spelled_out("; ".join(f"{problem.where} {problem.detail}" for problem in problems[:10]))
    rest = total - sum(problem.count for problem in problems[:10])
    return UserError(f"{shown}{f'; and {rest:,} more' if rest > 0 else ''}; {expected}")
