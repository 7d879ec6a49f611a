"""Data sets looked after: checked, merged, split, and cleaned of wrong labels; no shard is ever rewritten."""
