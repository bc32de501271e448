"""Text that a trainer prints: a line a step, with the norm after a word for it.

step:  10  loss:  8.1312  grad_norm:  1.2034  memory: ...                  torchtitan
step:200 smpl:2K ep:3 epch:0.09 loss:6.934 grdn:133.2 lr:1.0e-05           LeRobot
iteration  10/ 500000 | lm loss: 8.1E+00 | ... | grad norm: 1.803 | ...    Megatron
step    1/18865 | loss 11.00 (+nanz)| norm 15.27 (+nanz)| lr 6.0e-07       llm.c
{'loss': 2.3475, 'grad_norm': 6.882, 'learning_rate': 1.8e-06}             Hugging Face
"""

import re
from collections.abc import Iterator

from clipax.advice import _files
from clipax.advice._columns import Columns
from clipax.advice._files import File
from clipax.advice._log import LogError, rows

_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_NUMBER = (
    r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)(?![\w.%]))"
)
_BETWEEN = r"['\"]?\s*[:=]?\s*['\"]?"
# The surest first. What comes before must not be a part of a longer name.
_NORMS = tuple(
    re.compile(rf"(?<![\w/.])((?:\w+/)*{name}){_BETWEEN}{_NUMBER}", re.IGNORECASE)
    for name in (
        r"(?:total[ _])?(?:raw[ _])?grad(?:ient)?s?[ _]?norm",
        r"(?:gnorm|grdn)",
        r"(?<!param )(?<!params )(?<!weight )norm",
    )
)
_LOSS = re.compile(
    rf"(?<![\w/.])((?:train/|train_|train |lm )?loss){_BETWEEN}{_NUMBER}", re.IGNORECASE
)
_STEP = re.compile(
    rf"(?<![\w/.])((?:global_)?step|iteration|iter){_BETWEEN}\[?(\d+)([KMB])?\b", re.IGNORECASE
)


def read_text(file: File, wanted: str | None) -> Columns:
    """The numbers after the words for norm, loss and step, in lines that have a norm."""
    norms = _NORMS
    if wanted is not None:
        name = re.escape(wanted)
        norms = (re.compile(rf"(?<![\w/.])({name}){_BETWEEN}{_NUMBER}"),)
    columns, line, is_coarse, found = Columns(file.name, "line", wanted), None, False, None
    for line in _files.lines(file):
        for text in _parts(line.text):
            match = next(filter(None, (form.search(text) for form in norms)), None)
            if match is None:
                continue
            found = found or match[1]
            row = [(wanted or found, match[2])]
            if loss := _LOSS.search(text):
                row.append(("loss", loss[2]))
            if step := _STEP.search(text):
                row.append(("step", step[2]))
                is_coarse = is_coarse or step[3] is not None
            columns.add(line.number, row)
    if found is None and line is not None:
        word = repr(wanted) if wanted else "'grad_norm: 1.0', 'norm 1.0' or their like"
        message = f"no {word} with a number in {rows(line.number, 'line')} of text"
        raise LogError(f"{file.name}: {message}.")
    if is_coarse:
        # As "1K": many rows have one such step.
        del columns.columns["step"]
        columns.notes.append(f"{file.name}: its steps are rounded, as 1K.")
    return columns


def _parts(line: str) -> Iterator[str]:
    """A progress bar writes over its line many times."""
    for text in line.split("\r"):
        yield _COLOR.sub("", text) if "\x1b" in text else text
