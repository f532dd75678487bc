#!/usr/bin/env bash
# Removes the worktrees whose branch is merged into main, and the branches, after one question.
# Kept, with the reason: what is not merged, not committed, just begun, locked, or holds results that git ignores.
# A squashed merge does not look like one here; remove such a branch by hand.
# usage: scripts/clean-worktrees.sh
set -euo pipefail

here=$(git rev-parse --path-format=absolute --show-toplevel)
root=$(dirname "$(git rev-parse --path-format=absolute --git-common-dir)")

merged() { # BRANCH
  local trunk
  for trunk in main origin/main; do
    git -C "$root" merge-base --is-ancestor "refs/heads/$1" "$trunk" 2>/dev/null && return
  done
  return 1
}

just_begun() { # BRANCH: made from main, and nothing was ever committed to it
  local history
  history=$(git -C "$root" reflog show --format=%gs "refs/heads/$1" --)
  [[ $history == "branch: Created from main" ]]
}

reason_to_keep() { # FOLDER BRANCH LOCKED; prints nothing when it can go
  if [[ ! -d $1 ]]; then
    echo "its folder is gone; git worktree prune forgets it"
  elif [[ -n $3 ]]; then
    echo "locked"
  elif [[ -z $2 ]]; then
    echo "on no branch"
  elif [[ $2 == main || $1 == "$here" ]]; then
    echo "in use"
  elif [[ -n $(git -C "$1" status --porcelain) ]]; then
    echo "uncommitted changes"
  elif ! merged "$2"; then
    echo "not merged into main"
  elif just_begun "$2"; then
    echo "nothing committed yet"
  elif [[ -d $1/data/experiments && ! -L $1/data/experiments && -n $(ls -A "$1/data/experiments") ]]; then
    echo "results in data/experiments"
  fi
}

folders=()
branches=()
consider() { # FOLDER BRANCH LOCKED
  [[ $1 != "$root" ]] || return 0
  local reason
  reason=$(reason_to_keep "$@")
  if [[ -n $reason ]]; then
    echo "keep    $1 (${2:-no branch}): $reason"
  else
    echo "remove  $1 ($2)"
    folders+=("$1")
    branches+=("$2")
  fi
}

# One block a worktree, blocks ended by an empty line.
while read -r key value; do
  case $key in
    worktree) folder=$value branch='' locked='' ;;
    branch) branch=${value#refs/heads/} ;;
    locked) locked=yes ;;
    '') consider "$folder" "$branch" "$locked" ;;
  esac
done < <(git -C "$root" worktree list --porcelain)

if ((${#folders[@]} == 0)); then
  echo "nothing to remove"
  exit 0
fi
read -r -p "Remove these ${#folders[@]} worktrees and their branches? [y/N] " answer || true
if [[ ${answer:-} != [yY]* ]]; then
  echo "nothing removed"
  exit 0
fi
for i in "${!folders[@]}"; do
  git -C "$root" worktree remove "${folders[i]}"
  # -D: that it is merged was checked above, and -d would compare with the branch checked out here instead of main.
  git -C "$root" branch --quiet -D "${branches[i]}"
  echo "removed ${folders[i]} (${branches[i]})"
done
