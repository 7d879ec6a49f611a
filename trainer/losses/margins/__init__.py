"""What a margin is, and the families of margins."""
