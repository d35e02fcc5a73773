"""Pipeline stages at run time: schedules, and running them."""
