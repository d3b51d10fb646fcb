"""What was found out about a slim folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import VerificationError


@dataclass(frozen=True)
class Check:
    """
    One check.

    Args:
        name (`str`): what was looked at.
        ok (`bool`, *optional*): whether it is as it should be; None if it could not be checked.
        detail (`str`): what was found.
    """

    name: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{'-' if self.ok is None else 'ok' if self.ok else 'FAILED':6}  {self.name:8}  {self.detail}"


@dataclass(frozen=True)
class Verification:
    """
    What `verify_slim` found out about a folder.

    Args:
        folder (`Path`): the folder.
        checks (`tuple[Check, ...]`): one after the other.
        auto_class (`str`, *optional*): the class that loaded it.
        parameters (`int`, *optional*): in the reloaded model.
        max_difference (`float`, *optional*): largest difference to the reference, of the output that differs most.
        scale (`float`, *optional*): largest magnitude of that output's reference.
    """

    folder: Path
    checks: tuple[Check, ...]
    auto_class: str | None = None
    parameters: int | None = None
    max_difference: float | None = None
    scale: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.ok is not False for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong."""
        return tuple(f"{check.name}: {check.detail}" for check in self.checks if check.ok is False)

    def require(self) -> Verification:
        """
        This one, if nothing is wrong.

        Raises:
            VerificationError: naming what is.
        """
        if not self.ok:
            raise VerificationError(f"do not use {self.folder}: {'; '.join(self.problems)}")
        return self

    def figures(self) -> dict[str, Any]:
        """What was measured, for the report."""
        names = ("auto_class", "max_difference", "scale", "parameters")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        checks = [asdict(check) for check in self.checks]
        return {"folder": str(self.folder), "ok": self.ok, "checks": checks, **self.figures()}

    def __str__(self) -> str:
        verdict = "vanilla, and what it should be" if self.ok else "do not use this folder"
        return "\n".join([*map(str, self.checks), f"{self.folder}: {verdict}"])
