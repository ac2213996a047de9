"""The server's HTTP side: OpenAI's API over an engine, with keys, limits, figures and a page. Needs `roadie[serve]`.

app         the application, from an engine and a tokenizer
gate        who may come in, and with how much
server      runs it: slow clients, SIGTERM
"""

from __future__ import annotations

from roadie.extras import need

need("serve")
