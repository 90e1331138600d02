"""FoloVLLM's shared package: everything that is never the subject of a stage."""
