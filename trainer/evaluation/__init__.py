"""How good an Embedder is: error rates, protocols, intervals and thresholds, in numpy alone."""
