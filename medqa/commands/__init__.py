"""The commands of `medqa`: plan, verify-resume, and after a run evaluate, ask, compare, dashboard, export."""
