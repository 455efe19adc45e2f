"""The renderer of jointed people: images with exact labels; `render.render` is its face."""
