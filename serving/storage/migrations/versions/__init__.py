"""The steps from one schema to the next. One that was released is never changed; a new one follows it."""
