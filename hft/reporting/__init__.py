"""What was measured, side by side and beside what the papers have."""
