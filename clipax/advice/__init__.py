"""What methods would have done with the norms that a run logged.

From a file to a recommendation:

| room | what it makes of what came before |
|---|---|
| `_files` | bytes to lines, through gzip, from a path or standard input |
| `_tables`, `_records`, `_text`, `_extras` | a family of formats each: rows of names and numbers |
| `_names` | which name is that of a norm, a loss, a step |
| `_columns` | rows to columns, and the choice among them: a `Log` (`_log`) |
| `_read` | which reader a file needs; the files of a resumed run as one log |
| `_statistics` | norms to their usual size, drift, spread, tail and spikes |
| `_replay` | the code of a method, run over the norms |
| `_candidates` | each candidate, replayed, and what it would have done |
| `_rules` | which of them is recommended: all the rules there are |
| `_limits` | what a log cannot show, and which logs are refused |
| `_advise` | `advise`, which calls these four |
| `_report`, `_picture`, `_command` | a page, JSON, a picture; `clipax advise` |
"""

from clipax.advice._advise import Advice as Advice
from clipax.advice._advise import advise as advise
from clipax.advice._log import Log as Log
from clipax.advice._log import LogError as LogError
from clipax.advice._read import read as read
from clipax.advice._replay import Replay as Replay
from clipax.advice._replay import replay as replay
