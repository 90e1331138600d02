"""The pictures of the notes, drawn as SVG by `python -m compare.pictures`."""
