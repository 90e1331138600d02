"""Several engines under Ray Serve behind one address; needs the extras `serve` and `ray`."""
