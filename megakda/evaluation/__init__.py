"""What a model is worth: perplexity, lm_eval tasks, long-context tests without downloads."""
