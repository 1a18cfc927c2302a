"""The embedded lab: hosts with real systemd and sshd in containers on this machine."""
