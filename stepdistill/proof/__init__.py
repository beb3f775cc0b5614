"""The proving ground: every method trained on teachers in closed form, and held to theory."""
