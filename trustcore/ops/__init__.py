"""Pure functions on arrays, each with one public name and one oracle."""
