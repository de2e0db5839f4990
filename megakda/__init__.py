"""megakda: train language models whose main token mixer is Kimi Delta Attention."""

__version__ = "0.1.0"
