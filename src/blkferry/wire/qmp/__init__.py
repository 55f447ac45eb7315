"""QMP, sans-IO: `text` is one JSON text, `stream` the framing of many, `session` the conversation."""
