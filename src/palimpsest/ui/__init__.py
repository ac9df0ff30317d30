"""`palimpsest ui`: a run directory in the browser, on this machine only. Needs the extra `ui` (Gradio)."""
