#!/usr/bin/env bash
# Makes a worktree for a branch or an issue, ready to work in: it shares .venv and the caches, and has a copy of .env.
# usage: scripts/claude-worktree.sh NAME|NUMBER      in ../<repository>-worktrees/<name>; a number means issue-<number>
# The branch is taken up if it exists, here or on origin, and begins at main otherwise. The path is printed last.
# scripts/clean-worktrees.sh removes what is merged.
set -euo pipefail

say() { echo "claude-worktree.sh: $*" >&2; }

[[ $# == 1 && -n $1 && $1 != -* ]] || { say "usage: claude-worktree.sh NAME|NUMBER"; exit 2; }
branch=$1
[[ $branch =~ ^[0-9]+$ ]] && branch=issue-$branch
git check-ref-format --branch "$branch" >/dev/null 2>&1 || { say "'$branch' cannot be the name of a branch"; exit 2; }

# The repository's first checkout, from whichever worktree this is called.
root=$(dirname "$(git rev-parse --path-format=absolute --git-common-dir)")
folder=$(dirname "$root")/$(basename "$root")-worktrees/${branch//\//-}

exists() { git -C "$root" show-ref --verify --quiet "$1"; }

add_worktree() {
  if exists "refs/heads/$branch"; then
    git -C "$root" worktree add --quiet "$folder" "$branch"
  elif exists "refs/remotes/origin/$branch"; then
    git -C "$root" worktree add --quiet --track -b "$branch" "$folder" "origin/$branch"
  else
    git -C "$root" worktree add --quiet -b "$branch" "$folder" main
  fi
}

share() { # NAME, a folder that git ignores
  [[ -e $root/$1 && ! -e $folder/$1 ]] || return 0
  ln -s "$root/$1" "$folder/$1"
  # A pattern that ends in a slash ignores a folder but not a link to it, and the link would count as a change.
  git -C "$folder" check-ignore --quiet "$1" || echo "/$1" >>"$root/.git/info/exclude"
}

if [[ -e $folder ]]; then
  # A folder that is not a worktree would answer for a repository above it, or not at all.
  [[ $(git -C "$folder" rev-parse --show-toplevel 2>/dev/null) == "$(realpath "$folder")" ]] ||
    { say "$folder exists and is no worktree; move it away first"; exit 1; }
  say "it is there already"
else
  add_worktree
fi
for name in .venv .tiller_cache; do
  share "$name"
done
[[ ! -e $root/.env || -e $folder/.env ]] || cp -p "$root/.env" "$folder/.env"
say "branch $(git -C "$folder" branch --show-current); .venv is shared: use uv run --no-sync, and uv sync in $root only"
echo "$folder"
