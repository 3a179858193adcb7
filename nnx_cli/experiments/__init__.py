"""Many runs or measurements from one command."""
