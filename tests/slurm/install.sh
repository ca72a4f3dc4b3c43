#!/usr/bin/env bash
# Install what tests/slurm needs, as root on Debian or Ubuntu. Where that cannot be done in minutes it says so, and the
# tests are skipped.
set -uo pipefail
packages=(slurm-wlm slurmdbd munge mariadb-server)
install=(apt-get -qq install --no-install-recommends "${packages[@]}")
export DEBIAN_FRONTEND=noninteractive

dpkg --status "${packages[@]}" &> /dev/null && exit 0
# Only the downloads have a time limit: an installation that is cut off leaves a mess.
if [ "$(id -u)" = 0 ] && timeout 60 apt-get -qq update && timeout 120 "${install[@]}" --download-only; then
    "${install[@]}"
fi > /dev/null 2>&1
dpkg --status "${packages[@]}" &> /dev/null || echo "Cannot install ${packages[*]}: the tests of Slurm are skipped."
