"""Where images come from: folders, videos, the renderer."""
