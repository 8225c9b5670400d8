"""The synthetic world of the included `shapes` model: scenes, captions, pictures, and how to read pictures back."""
