"""Serve a trained embedder: who is this, or is it nobody we know?"""
