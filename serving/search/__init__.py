"""The index of a gallery: vectors in blocks, searched by FAISS, kept in step with the store, and its snapshots."""
