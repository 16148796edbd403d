# What pip says, made short: a line for each 20 packages that it has found, for each large file that it
# fetches, and before it unpacks them; all that is no routine. Ends as pip did: its last line is
# "pip ended with CODE".
/^pip ended with [0-9]+$/ { code = $4; next }
/^ *(Collecting|Processing) / {
    found += 1
    if (found % 20 == 0) say(found " packages found")
    next
}
/^ *Downloading .*\.(whl|gz|zip) .*[0-9][0-9](\.[0-9]+)? MB\)/ { say("fetching " $2 " " $3 " " $4); next }
/^WARNING: / && warned[$2]++ { next }  # of one kind the first
/^Installing collected packages: / { say("unpacking " NF - 3 " packages: a minute or less"); next }
/^Successfully installed / { say(NF - 2 " packages installed"); next }
/^ *(Downloading|Using cached|Obtaining|Preparing|Getting|Installing|Building|Created|Stored|Checking) / { next }
/^ *(Requirement already|Looking in|Attempting uninstall:|Found existing|Uninstalling|Successfully) / { next }
/^ *(Obtaining dependency|Running command|finished|Editable|Ignoring|Discarding|Saved|Link|Resolved)/ { next }
/^ *$/ || /^ +[━╸╺-]/ { next }
{ say($0) }
END { exit code }

function say(line) {
    print line
    fflush()
}
