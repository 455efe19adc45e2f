"""A page in the browser on which guidance is tried by hand; the only place that knows gradio."""
