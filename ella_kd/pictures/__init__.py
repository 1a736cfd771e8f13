"""Pictures in: where they start on a schedule, what of them is kept, and how they are read and put back."""
