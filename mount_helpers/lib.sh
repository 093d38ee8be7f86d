# shellcheck shell=bash disable=SC2034
#
# lib.sh: what setup, install and uninstall have in common.  To be sourced, after `set -euo pipefail`.
# A line for the user goes to stderr, begins with the script's name, and appears only when something is done or is wrong.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$1"; say "hint: $2"; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "must be run as root${1:+, to $1}" "sudo $0"
}

# One at a time, for the rest of the script.  A directory that every Debian has serves as the lock: it needs no file.
lock() {
    exec 9</etc/apt || die "found no /etc/apt" "this script is for Debian 12 and 13"
    flock --nonblock 9 || { say "waiting for another of pkernfs's scripts to end"; flock 9; }
}

# step WHAT COMMAND...: say what is done, and do it; if it fails, show the end of its output, and end.
step() {
    local what=$1 log
    shift
    say "$what"
    log=$(mktemp)
    # Without the lock's descriptor: a daemon that a package starts would hold the lock for ever.
    if "$@" >"$log" 2>&1 </dev/null 9<&-; then
        rm -f "$log"
    else
        tail -n 20 "$log" | cut -c 1-200 | sed 's/^/    /' >&2
        die "failed: $what" "the whole output is in $log"
    fi
}

# Names of those of the given Debian packages that are not installed, each once.
missing_packages() {
    local name status
    declare -A installed=()
    while read -r name status; do
        if [ "$status" = installed ]; then installed[$name]=1; fi
    done < <(dpkg-query --show --showformat '${Package} ${db:Status-Status}\n' "$@" 2>/dev/null)
    for name; do
        [ -n "${installed[$name]:-}" ] || printf '%s\n' "$name"
        installed[$name]=1
    done
}

install_packages() {
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes
        -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3)
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" != 0 ] || return 0
    need_root "install ${missing[*]}"
    step "fetching the lists of packages" "${apt[@]}" update
    step "installing ${missing[*]}" "${apt[@]}" install --no-install-recommends "${missing[@]}"
}

# What it takes to build pyfuse3 and to mount.
readonly BASE_PACKAGES=(fuse3 gcc libc6-dev libfuse3-dev mount pkg-config python3-dev python3-venv)

# Path of a Python that is new enough: the one that PYTHON names, else Debian's own if it is.
find_python() {
    local python
    for python in ${PYTHON:-/usr/bin/python3 $(type -ap python3 python3.{11..20} || true)}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$python"
            return
        fi
    done
    die "found no python3 >= 3.11" "this script is for Debian 12 and 13; elsewhere put such a python3 on PATH"
}

# make_venv PYTHON DIRECTORY: a virtual environment, made anew if the one that is there is for another Python or place.
make_venv() {
    local made_for
    made_for="$2 $("$1" -VV)"
    [ "$(cat "$2/made-for" 2>/dev/null)" != "$made_for" ] || return 0
    step "making $2 with $("$1" -V)" "$1" -m venv --clear "$2"
    printf '%s\n' "$made_for" >"$2/made-for"
}

# pip_install DIRECTORY ARGUMENT...: pip of the virtual environment DIRECTORY.
pip_install() {
    local directory=$1
    shift
    "$directory/bin/python" -m pip install --no-input --disable-pip-version-check --root-user-action=ignore \
        --compile "$@"
}

# What an installation for the whole system consists of.
PREFIX=$(realpath --canonicalize-missing "${PREFIX:-/usr/local}")
readonly HOME_DIR=$PREFIX/lib/pkernfs
# The manual and completion, below PREFIX/share.
readonly DOCS=(
    man/man1/pkernfs{,-iommu}.1 man/man5/pkernfs.5 man/man8/{mkfs,mount,fsck}.pkernfs.8
    {bash-completion/completions/,zsh/site-functions/_}{pkernfs,{mkfs,mount,fsck}.pkernfs}
)
readonly LINKS=("$PREFIX/bin/pkernfs" /sbin/{mount,mount.fuse,mkfs,fsck}.pkernfs "${DOCS[@]/#/$PREFIX/share/}")

# target_of LINK: what it points to.  For mount(8) the type of a mount that is there is fuse.pkernfs.
target_of() {
    local name=${1##*/}
    case $1 in
    "$PREFIX"/share/*) printf '%s\n' "$HOME_DIR/${1#"$PREFIX"/}" ;;
    *) printf '%s\n' "$HOME_DIR/venv/bin/${name/mount.fuse./mount.}" ;;
    esac
}

# mounts_in_use: a line for each mount of pkernfs, in whatever mount namespace: MOUNTPOINT (REGION).
mounts_in_use() {
    local path line
    # One process of each mount namespace; its line of mountinfo is split at the bytes that the kernel puts.
    { find /proc/[0-9]*/ns/mnt -maxdepth 0 -printf '%l %h\n' 2>/dev/null || true; } | sort -u -k 1,1 | while read -r _ path; do
        cat "${path%/ns}/mountinfo" 2>/dev/null || true
    done | awk -F ' ' '/ - fuse\.pkernfs / && !seen[$3]++ {
        split(substr($0, index($0, " - fuse.pkernfs ") + 16), rest, " "); print $5 " (" rest[1] ")" }' |
        while IFS= read -r line; do printf '%b\n' "${line//\\/\\0}"; done
}

# venvs_in_use: those of our virtual environments from which something runs.  By the command lines, which begin with the
# Python of the environment.
venvs_in_use() {
    { cat /proc/[0-9]*/cmdline 2>/dev/null || true; } | tr '\0' '\n' |
        { grep -aoE "^$HOME_DIR/venv[^/]*/bin/" || true; } | sort -u | sed 's,/bin/$,,'
}

# Is LINK one that install made?
ours() {
    [ -L "$1" ] && [ "$(readlink "$1")" = "$(target_of "$1")" ]
}

# -- guests of the tests: what is taken out of Debian's packages, and not installed --

# The package that the metapackage $1 stands for today.
concrete_package() {
    LC_ALL=C apt-cache depends --important "$1" 2>/dev/null |
        awk '$1 == "Depends:" && $2 ~ /^linux-image-/ && !seen++ { print $2 }'
}

# Download the package $1 with apt and unpack it into $2.
unpack_package() {
    local name=$1 into=$2 deb
    mkdir -p "$into"
    (cd "$into" && step "downloading $name" apt-get -q -o APT::Sandbox::User=root -o Acquire::Retries=3 download "$name")
    for deb in "$into"/*.deb; do
        dpkg -x "$deb" "$into"
        rm "$deb"
    done
}

# Unpack the kernel of the metapackage $1 into $2.
unpack_kernel() {
    local name
    name=$(concrete_package "$1" || true)
    if [ -z "$name" ]; then
        [ "$(id -u)" != 0 ] || step "fetching the lists of packages" apt-get -q update
        name=$(concrete_package "$1" || true)
    fi
    [ -n "$name" ] || die "apt knows no package $1" \
        "run 'apt-get update' as root; on a machine that is not amd64, add the architecture first"
    unpack_package "$name" "$2"
}

# A busybox that needs nothing else: $1/busybox.
unpack_busybox() {
    unpack_package busybox-static "$1/busybox-static"
    mv "$1"/busybox-static/bin/busybox "$1/busybox" 2>/dev/null ||
        mv "$1"/busybox-static/usr/bin/busybox "$1/busybox" # Debian 13 has merged the two
}

# Pack the directory $1, with its bin/busybox and init, as the initramfs $2.  busybox does it: one tool less to install.
pack_initramfs() {
    chmod 755 "$1/init"
    (cd "$1" && find . | bin/busybox cpio -o -H newc 2>/dev/null | gzip -n -"${3:-9}") >"$2"
}
