"""Which codecs a command measures, and at which qualities."""

from __future__ import annotations

from collections.abc import Sequence

from compand.errors import UsageError
from compand.eval import subjects


def select(codecs: Sequence[str] | None, qualities: str | None, medium: str) -> dict[str, tuple[float, ...]]:
    """Qualities by codec, as `compand.eval.runner.measure_all` takes them.

    Args:
        codecs: names or checkpoint folders; None: everything of the medium that works here.
        qualities: None for each codec's own grid; else parts with ";" between them: "jpeg=10,50" for one codec, and a
            list without a name, "1,2.5", for every codec of compand.
        medium: "image" or "audio".

    Returns:
        Qualities, ascending, by what `compand.eval.subjects.find` takes in any process.

    Raises:
        UsageError: a codec does not exist, is given twice or codes another medium; qualities cannot be read, name a
            codec that is not chosen, or are none of the codec's.
    """
    chosen = {}
    for name in codecs if codecs is not None else subjects.names(medium):
        subject = subjects.find(name, medium)
        if subject.name in chosen:
            raise UsageError(f"{subject.name} is given twice: name each codec once")
        chosen[subject.name] = subject
    if not chosen:
        raise UsageError(f"no codec for {medium} is chosen: name one with --codecs")
    wanted = _parsed(qualities)
    common = wanted.pop("", None)
    named = {subjects.find(name, medium).name: values for name, values in wanted.items()}
    unknown = ", ".join(named.keys() - chosen)
    if unknown:
        raise UsageError(f"--qualities names {unknown}, not among the codecs chosen: {', '.join(chosen)}")
    selected = {}
    for name, subject in chosen.items():
        values = named.get(name) or (common if subject.kind == "compand" else None)
        for quality in values or ():
            subject.check_quality(quality)  # once and now, not as a problem of every item
        selected[subject.source] = values or subject.qualities
    return selected


def _parsed(text: str | None) -> dict[str, tuple[float, ...]]:
    """Qualities by the name before "="; "" where there is none.

    >>> _parsed("jpeg=10,5;1,2.5")
    {'jpeg': (5.0, 10.0), '': (1.0, 2.5)}
    """
    result: dict[str, tuple[float, ...]] = {}
    for part in filter(None, map(str.strip, (text or "").split(";"))):
        name, _, values = part.rpartition("=")
        try:
            numbers = sorted({float(value) for value in values.split(",")})
        except ValueError:
            raise UsageError(
                f'--qualities has no numbers in "{part}": write "jpeg=10,50;hyperprior=1,2.5" or "1,4,8"'
            ) from None
        if name.strip() in result:
            raise UsageError(f"--qualities names {name.strip() or 'all codecs'} twice: join the lists")
        result[name.strip()] = tuple(numbers)
    return result
