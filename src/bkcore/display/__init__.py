"""Output for people, during and after a run: lines, progress bars and pictures."""
