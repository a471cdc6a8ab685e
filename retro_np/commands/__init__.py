"""The commands of `retro-np`, by what they are about. Each imports what it needs when it runs."""
