"""What: cuts, schedules and forecasts."""
