"""Label making: data sources, annotators, the marionette renderer and the command that writes shards."""
