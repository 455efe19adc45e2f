"""The page: its tabs, its looks and its server."""

import gradio as gr

from rg.app import tab_drag, tab_pose, view
from rg.app.model import Model

TABS = {"Pose": tab_pose.build, "Drag": tab_drag.build}
# Gradio's own themes ask a server for their fonts.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def build(model: Model) -> gr.Blocks:
    """The page of a model."""
    with gr.Blocks(title="Readout guidance", analytics_enabled=False) as page:
        for name, tab in TABS.items():
            with gr.Tab(name):
                tab(model)
        page.unload(model.stop)
    return page


def serve(model: Model, *, host: str, port: int, auth: tuple[str, str] | None, upload: int) -> gr.Blocks:
    """Serves the page in threads of its own.

    Args:
        port: 0 takes a free one.
        auth: name and password; None lets in everybody who reaches the host.
        upload: the most bytes of a file.
    """
    page = build(model).queue(max_size=64, default_concurrency_limit=None, api_open=False)
    page.launch(
        server_name=host,
        server_port=port or None,
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=upload,
        footer_links=[],
        theme=gr.themes.Base(**FONTS),
        css_paths=[view.STATIC / "page.css"],
    )
    print(f"{page.local_url}", flush=True)
    return page
