"""What a project will take, before anything of it runs: tokens, bytes, hours, money."""
