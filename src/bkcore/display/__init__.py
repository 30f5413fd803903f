"""What a person sees while something runs, and afterwards: lines, progress bars and pictures."""
