"""Makes what tiny.yaml starts from: a small Llama, trained for a minute on Python's own language reference."""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from hawada_peft.demo.data import held_out_topics
from hawada_peft.demo.tasks import TASKS
from hawada_peft.demo.teachers import train_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("tiny"))
    folder = parser.parse_args().folder
    task = TASKS["topics"]
    (folder / "teacher").mkdir(parents=True)
    train_teacher(task, task.load(), task.full.teacher, folder / "teacher")
    left_out = set(held_out_topics(topics))
    text = "\n".join(text for name, text in sorted(topics.items()) if name not in left_out)
    (folder / "text.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
