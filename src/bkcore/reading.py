"""Reading files that somebody else may have written, as `bkcore_runtime.reading` does it."""

from bkcore_runtime import reading as _reading

JSON_BYTES = _reading.JSON_BYTES
open_regular = _reading.open_regular
read_bytes = _reading.read_bytes
parse_json = _reading.parse_json
read_json = _reading.read_json
shown = _reading.shown
foreign = _reading.foreign
shortened = _reading.shortened
