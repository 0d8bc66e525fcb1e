"""The one training loop, and what it needs: processes, schedules, random states, signals."""
