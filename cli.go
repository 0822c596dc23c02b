package main

// The command line: how a command is found, one function for each command, and last what
// `timedb api` wires together and checks before it serves.

import (
	"context"
	_ "embed"
	"encoding"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	osuser "os/user"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

const release = "1.1.0" // what `timedb version` and GET / tell

//go:embed docs/usage.txt
var usage string // the manual: an overview, and for each command a section

// cli is one invocation, with the flags that many commands have.
type cli struct {
	env            func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer
	flags          *flag.FlagSet // of the command, once it is known
	dsn, schema    string
	tenant         uuid // together with email whom the command is about
	email          string
	yes            bool // nothing is to be asked
}

// command is one line of the command table.
type command struct {
	name string
	run  func(c *cli, ctx context.Context, args []string) error
}

func commands() []command {
	return []command{
		{"create tables", (*cli).createTables},
		{"delete tables", (*cli).deleteTables},
		{"delete runs", (*cli).deleteRuns},
		{"delete series", (*cli).deleteSeries},
		{"delete tenant", (*cli).deleteTenant},
		{"series update", (*cli).seriesUpdate},
		{"users create", (*cli).usersCreate},
		{"users list", (*cli).usersList},
		{"users deactivate", (*cli).usersDeactivate},
		{"users activate", (*cli).usersActivate},
		{"users regenerate-key", (*cli).usersRegenerateKey},
		{"keys create", (*cli).keysCreate},
		{"keys list", (*cli).keysList},
		{"keys revoke", (*cli).keysRevoke},
		{"audit", (*cli).auditTrail},
		{"api", (*cli).api},
		{"version", (*cli).version},
	}
}

// usageError is an error of the command line itself.
type usageError struct{ error }

func wrongUsage(format string, args ...any) error {
	return usageError{fmt.Errorf(format, args...)}
}

// mistyped is the usageError for what repeats the command line, unless that seems to hold a DSN.
func mistyped(err error) error {
	if strings.ContainsAny(err.Error(), "@=/") {
		return wrongUsage("the command line is not understood")
	}
	return usageError{err}
}

// run carries out one command line and returns the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, env func(string) string, stdin io.Reader,
	stdout, stderr io.Writer) int {
	c := &cli{env: env, stdin: stdin, stdout: stdout, stderr: stderr}
	name, err := c.dispatch(ctx, args)
	var wrong usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintln(stdout, manual(name))
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(stderr, "ERROR: %v; see: timedb %s\n", err, strings.TrimSpace("help "+name))
		return 2
	case sqlState(err) == "42P01": // undefined_table
		err = errors.New("a table is missing: run timedb create tables --with-users")
	}
	fmt.Fprintln(stderr, "ERROR:", err)
	return 1
}

// manual returns the section on a command, the overview, or of the overview the lines on a group of
// commands such as users.
func manual(name string) string {
	_, section, found := strings.Cut("== \n"+usage, "== "+name+"\n")
	section, _, _ = strings.Cut(section, "\n== ")
	if found {
		return strings.TrimSpace(section)
	}
	group := regexp.MustCompile(`(?m)^  timedb ` + regexp.QuoteMeta(name) + ` .*$`)
	return strings.Join(group.FindAllString(usage, -1), "\n")
}

// dispatch finds the command and runs it. It returns the name of the command or of the group that
// the error is about, "" if there is none.
func (c *cli) dispatch(ctx context.Context, args []string) (name string, err error) {
	line := strings.Join(args, " ")
	switch line {
	case "", "-h", "--help", "help":
		return "", flag.ErrHelp
	case "--version":
		args = []string{"version"}
	}
	name, isHelp := strings.CutPrefix(line, "help ")
	name, flags, _ := strings.Cut(name, " -")
	var known []string // by as many words as were given
	for _, cmd := range commands() {
		words := strings.Fields(cmd.name)
		if len(args) >= len(words) && slices.Equal(args[:len(words)], words) {
			return cmd.name, cmd.run(c, ctx, args[len(words):])
		}
		if strings.Contains(name, " ") {
			known = append(known, cmd.name)
		} else {
			known = append(known, words[0])
		}
	}
	switch {
	case manual(name) == "":
		return "", mistyped(unknownName("command", name, slices.Compact(known)))
	case isHelp, flags == "h", flags == "-help":
		return name, flag.ErrHelp
	}
	fmt.Fprintln(c.stderr, manual(name))
	return name, wrongUsage("%s needs one more word", name)
}

// ---- Flags

// newFlags begins the flags of a command. Nothing is printed by the package flag itself.
func (c *cli) newFlags() {
	c.flags = flag.NewFlagSet("", flag.ContinueOnError)
	c.flags.SetOutput(io.Discard)
}

// databaseFlags begins the flags of a command that uses the database.
func (c *cli) databaseFlags() {
	c.newFlags()
	c.text(&c.dsn, "", "d", "dsn")
	c.text(&c.schema, "public", "s", "schema")
}

// userFlags begins the flags of a command about one user.
func (c *cli) userFlags() {
	c.databaseFlags()
	c.word(&c.tenant, "t", "tenant-id")
	c.text(&c.email, "", "e", "email")
}

// word declares a flag, by one or two names, that reads itself.
func (c *cli) word(into encoding.TextUnmarshaler, names ...string) {
	for _, name := range names {
		c.flags.Func(name, "", func(text string) error {
			return inputError("--"+names[len(names)-1], into.UnmarshalText([]byte(text)))
		})
	}
}

// text declares a flag, by one or two names, that takes any text.
func (c *cli) text(into *string, byDefault string, names ...string) {
	for _, name := range names {
		c.flags.StringVar(into, name, byDefault, "")
	}
}

// toggle declares a flag, by one or two names, that is given or not.
func (c *cli) toggle(into *bool, names ...string) {
	for _, name := range names {
		c.flags.BoolVar(into, name, false, "")
	}
}

// parse reads the flags. Nothing may follow them.
func (c *cli) parse(args []string) error {
	err := c.flags.Parse(args)
	c.email = strings.TrimSpace(c.email)
	if err == nil && c.flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", c.flags.Arg(0))
	}
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return err
	}
	if name, ok := strings.CutPrefix(err.Error(), "flag provided but not defined: -"); ok {
		var known []string
		c.flags.VisitAll(func(f *flag.Flag) { known = append(known, "--"+f.Name) })
		err = unknownName("flag", "--"+name, known)
	}
	return mistyped(err)
}

// open reads the flags and opens the store that they name, for the command alone.
func (c *cli) open(args []string) (*store, error) {
	if err := c.parse(args); err != nil {
		return nil, err
	}
	return c.openPool(0, commandPool)
}

// commandPool is how many connections a command has: one for its transaction, and one on which
// statements are prepared.
const commandPool = 2

// openPool opens a store with so many connections, on which a statement ends after timeout; 0 means
// never. The DSN is that of the flag or of the environment.
func (c *cli) openPool(timeout time.Duration, connections int) (*store, error) {
	dsn := c.dsn
	source := "--dsn"
	for _, name := range []string{"TIMEDB_DSN", "DATABASE_URL"} {
		if dsn == "" {
			dsn = c.env(name)
			source = name
		}
	}
	if dsn == "" {
		return nil, wrongUsage("no database: give --dsn, or set TIMEDB_DSN or DATABASE_URL")
	}
	st, err := openStore(dsn, c.schema, timeout, connections, c.stderr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", source, err)
	}
	st.place += " (by " + source + ")"
	st.operator = operator()
	return st, nil
}

// operator is the operating-system user who runs this program, for the audit trail.
func operator() string {
	u, err := osuser.Current()
	if err != nil {
		return fmt.Sprintf("uid %d", os.Getuid())
	}
	return u.Username
}

// confirm asks unless it was told yes. Anything but yes, and nobody to ask, is an error.
func (c *cli) confirm(question string, args ...any) error {
	if c.yes {
		return nil
	}
	fmt.Fprintf(c.stderr, question+" [y/N] ", args...)
	var answer string
	_, err := fmt.Fscanln(c.stdin, &answer)
	answer = strings.ToLower(answer)
	if err == nil && (answer == "y" || answer == "yes") {
		return nil
	}
	return errors.New("not confirmed; nothing was changed. Pass -y to do it without asking")
}

// say prints what was done.
func (c *cli) say(format string, args ...any) error {
	_, err := fmt.Fprintf(c.stdout, format+"\n", args...)
	return err
}

// ---- Commands

func (c *cli) version(_ context.Context, args []string) error {
	c.newFlags()
	if err := c.parse(args); err != nil {
		return err
	}
	return c.say("timedb %s", release)
}

func (c *cli) createTables(ctx context.Context, args []string) error {
	var withUsers, citus, dryRun bool
	var role string
	c.databaseFlags()
	c.toggle(&withUsers, "with-users")
	c.text(&role, "", "app-role")
	c.toggle(&citus, "citus")
	c.toggle(&dryRun, "dry-run")
	c.toggle(&c.yes, "y", "yes")
	if err := c.parse(args); err != nil {
		return err
	}
	if dryRun {
		text := tableSections(c.schema, catalog{}, withUsers, citus, role)
		return c.say("BEGIN;\n%sCOMMIT;", text)
	}
	st, err := c.openPool(0, commandPool)
	if err != nil {
		return err
	}
	defer st.db.Close()
	before, err := st.catalog(ctx)
	if err != nil {
		return err
	}
	if before.version > schemaVersion {
		return before.check()
	}
	err = c.confirm("Create timedb's tables in schema %q of %s?", c.schema, st.place)
	if err != nil {
		return err
	}
	err = st.execAll(ctx, tableSections(c.schema, before, withUsers, citus, role))
	if err != nil {
		return err
	}
	after, err := st.catalog(ctx)
	if err != nil {
		return err
	}
	if role != "" {
		fmt.Fprintf(c.stdout, "granted  %s what timedb api needs\n", role)
	}
	return c.sayCreated(before, after)
}

// sayCreated prints what create tables made, who is served now, and what comes next.
func (c *cli) sayCreated(before, after catalog) error {
	for _, name := range after.names {
		state := "created"
		if slices.Contains(before.names, name) {
			state = "exists"
		}
		fmt.Fprintf(c.stdout, "%-8s %s.%s\n", state, c.schema, name)
	}
	if slices.Contains(after.names, "users_table") {
		return c.say("Every request needs a key. Next: timedb users create -t UUID -e EMAIL")
	}
	return c.say("Everyone is served without a key, until create tables --with-users. " +
		"Next: timedb api")
}

// tableSections is the SQL that makes of what there is what there should be.
func tableSections(schema string, before catalog, withUsers, citus bool, role string) string {
	hasUsers := withUsers || slices.Contains(before.names, "users_table")
	isOld := before.version > 0 && before.version < schemaVersion
	return schemaSections(schema, role, map[string]bool{
		"begin":  true,
		"tables": true,
		// Those of an earlier version have the keys in users_table.
		"users":               withUsers || hasUsers && isOld,
		"citus":               citus,
		"upgrade":             before.version < schemaVersion,
		"views":               true,
		"upgrade of columns":  before.version < schemaVersion,
		"app role":            role != "",
		"app role with users": role != "" && hasUsers,
	})
}

func (c *cli) deleteTables(ctx context.Context, args []string) error {
	c.databaseFlags()
	c.toggle(&c.yes, "y", "yes")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	before, err := st.catalog(ctx)
	if err != nil {
		return err
	}
	if len(before.names) == 0 {
		return c.say("There is nothing of timedb in schema %q.", c.schema)
	}
	var lost loss
	if before.version > 0 {
		lost, err = st.Everything(ctx)
		if err != nil {
			return err
		}
	}
	names := strings.Join(before.names, ", ")
	err = c.confirm("Delete %s in schema %q of %s, with ALL data (%s) and the audit trail?",
		names, c.schema, st.place, lost)
	if err != nil {
		return err
	}
	err = st.execAll(ctx, schemaSections(c.schema, "", map[string]bool{"delete": true}))
	if err != nil {
		return err
	}
	return c.say("deleted  %s (%s)", names, lost)
}

// tenantFlags begins the flags of a command about one tenant's data.
func (c *cli) tenantFlags() {
	c.databaseFlags()
	c.word(&c.tenant, "t", "tenant-id")
}

// openTables opens the store for a command about one tenant's data, and returns which tables there
// are. The caller closes the store, unless there is an error.
func (c *cli) openTables(ctx context.Context) (*store, catalog, error) {
	if c.tenant == "" {
		return nil, catalog{}, wrongUsage("--tenant-id is required")
	}
	st, err := c.openPool(0, commandPool)
	if err != nil {
		return nil, catalog{}, err
	}
	found, err := st.catalog(ctx)
	if err == nil {
		err = found.check()
	}
	if err == nil && found.version == 0 {
		err = errors.New("there are no tables: run timedb create tables")
	}
	if err != nil {
		_ = st.db.Close()
	}
	return st, found, err
}

func (c *cli) deleteRuns(ctx context.Context, args []string) error {
	what := erasure{action: "delete runs"}
	c.tenantFlags()
	c.word(&what.Runs, "run-id")
	c.word((*bound)(&what.KnownBefore), "known-before")
	return c.erase(ctx, args, "--run-id or --known-before", &what)
}

func (c *cli) deleteSeries(ctx context.Context, args []string) error {
	what := erasure{action: "delete series"}
	c.tenantFlags()
	c.word(&what.Series, "k", "key")
	return c.erase(ctx, args, "--key", &what)
}

func (c *cli) deleteTenant(ctx context.Context, args []string) error {
	c.tenantFlags()
	return c.erase(ctx, args, "", &erasure{action: "delete tenant", Everything: true})
}

// erase reads the flags, of which some are required, asks, and erases what they name.
func (c *cli) erase(ctx context.Context, args []string, required string, what *erasure) error {
	c.toggle(&c.yes, "y", "yes")
	if err := c.parse(args); err != nil {
		return err
	}
	if asJSON(what) == "{}" {
		return wrongUsage("%s is required", required)
	}
	if len(what.Runs) > 0 && what.KnownBefore != 0 {
		return wrongUsage("--run-id and --known-before: expected one of them")
	}
	st, found, err := c.openTables(ctx)
	if err != nil {
		return err
	}
	defer st.db.Close()
	of := "tenant " + string(c.tenant)
	if what.Everything {
		of += " and its users"
		what.users = slices.Contains(found.names, "users_table")
	}
	caller := operatorOf(string(c.tenant))
	lost, err := st.CountChosen(ctx, caller, what)
	if err != nil {
		return err
	}
	if lost == (loss{}) && !what.Everything {
		return c.say("There is nothing to erase.")
	}
	err = c.confirm("Erase %s of %s for good, in schema %q of %s?", lost, of, c.schema, st.place)
	if err != nil {
		return err
	}
	lost, err = st.Erase(ctx, caller, what)
	if err != nil {
		return err
	}
	return c.say("Erased %s of %s.", lost, of)
}

func (c *cli) seriesUpdate(ctx context.Context, args []string) error {
	var id uuid
	var key string // as it is stored, whatever keys must be like now
	var change seriesChange
	c.tenantFlags()
	c.text(&key, "", "k", "key")
	c.word(&id, "series-id")
	c.word(&change.key, "rename")
	c.word(&change.unit, "unit")
	c.flags.Func("description", "", func(text string) error {
		change.description = new(prose)
		return inputError("--description", change.description.UnmarshalText([]byte(text)))
	})
	if err := c.parse(args); err != nil {
		return err
	}
	switch {
	case key == "" && id == "":
		return wrongUsage("--key or --series-id is required")
	case change == seriesChange{}:
		return wrongUsage("expected --rename, --unit or --description")
	}
	st, _, err := c.openTables(ctx)
	if err != nil {
		return err
	}
	defer st.db.Close()
	ref := seriesRef{ID: id, Key: label(key)}
	changed, err := st.UpdateSeries(ctx, operatorOf(string(c.tenant)), ref, change)
	if err != nil {
		return err
	}
	return c.say("%s", changed)
}

func (c *cli) usersCreate(ctx context.Context, args []string) error {
	var readOnly, quiet bool
	var expires expiry
	c.userFlags()
	c.toggle(&readOnly, "read-only")
	c.word(&expires, "expires")
	c.toggle(&quiet, "q", "quiet")
	if err := c.parse(args); err != nil {
		return err
	}
	name, domain, _ := strings.Cut(c.email, "@")
	switch {
	case c.tenant == "":
		return wrongUsage("--tenant-id is required")
	case c.email == "":
		return wrongUsage("--email is required")
	case name == "" || domain == "" || new(label).UnmarshalText([]byte(c.email)) != nil:
		return wrongUsage("--email: expected an address such as alice@example.com")
	}
	st, err := c.openPool(0, commandPool)
	if err != nil {
		return err
	}
	defer st.db.Close()
	u := user{Tenant: string(c.tenant), Email: c.email}
	secret, k, digest := makeKey(&u, "default", readOnly, expires)
	if err := st.CreateUser(ctx, &u, k, digest); err != nil {
		return err
	}
	return c.showKey(k, secret, quiet)
}

// makeKey returns a new key of u, what will be stored of it, and its digest.
func makeKey(u *user, name string, readOnly bool, ends expiry) (
	secret string, k *key, digest []byte) {
	secret, id, digest := newKey()
	k = &key{
		ID:        id,
		Tenant:    u.Tenant,
		Email:     u.Email,
		Name:      name,
		Access:    "rw",
		ExpiresAt: ends.time(),
		userID:    u.ID,
	}
	if readOnly {
		k.Access = "ro"
	}
	return secret, k, digest
}

// showKey prints a new key, once: it is stored nowhere.
func (c *cli) showKey(k *key, secret string, quiet bool) error {
	if quiet {
		return c.say("%s", secret)
	}
	return c.say("User ID: %s\nTenant ID: %s\nEmail: %s\nKey ID: %s\nKey name: %s\n"+
		"Access: %s\nExpires: %s\n"+
		"API Key: %s\nThe key will not be shown again: keep it now.",
		k.userID, k.Tenant, k.Email,
		k.ID, k.Name, k.Access,
		showTime(k.ExpiresAt), secret)
}

// printJSON prints v for programs.
func (c *cli) printJSON(v any) error {
	out := json.NewEncoder(c.stdout)
	out.SetIndent("", "  ")
	return out.Encode(v)
}

// printTable prints lines of cells under a header, all in columns.
func (c *cli) printTable(header []string, lines [][]string) error {
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	for _, line := range slices.Insert(lines, 0, header) {
		fmt.Fprintln(w, strings.Join(line, "\t"))
	}
	return w.Flush()
}

func (c *cli) usersList(ctx context.Context, args []string) error {
	var withInactive, wantJSON bool
	c.databaseFlags()
	c.word(&c.tenant, "t", "tenant-id")
	c.toggle(&withInactive, "include-inactive") // accepted for scripts; they are listed anyway
	c.toggle(&wantJSON, "json")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	users, err := st.Users(ctx, c.tenant, "")
	if err != nil {
		return err
	}
	if wantJSON {
		return c.printJSON(users)
	}
	var lines [][]string
	for _, u := range users {
		status := "active"
		if !u.Active {
			status = "deactivated"
		}
		lines = append(lines, []string{
			u.Email, u.Tenant,
			status, strconv.Itoa(u.LiveKeys),
			showTime(u.LastUsed), u.CreatedAt.UTC().Format(time.DateOnly),
		})
	}
	return c.printTable(
		[]string{"EMAIL", "TENANT ID", "STATUS", "LIVE KEYS", "LAST USED", "CREATED"}, lines)
}

// findUser reads the flags, opens the store and finds the one user that they name. The caller
// closes the store, unless there is an error.
func (c *cli) findUser(ctx context.Context, args []string) (*store, *user, error) {
	st, err := c.open(args)
	if err != nil {
		return nil, nil, err
	}
	if c.email == "" {
		_ = st.db.Close()
		return nil, nil, wrongUsage("--email is required")
	}
	users, err := st.Users(ctx, c.tenant, c.email)
	if err == nil && len(users) == 1 {
		return st, &users[0], nil
	}
	_ = st.db.Close()
	if err != nil {
		return nil, nil, err
	}
	if len(users) == 0 {
		return nil, nil, fmt.Errorf("no user has the email '%s'; see: timedb users list", c.email)
	}
	tenants := ""
	for _, u := range users {
		tenants += "\n  " + u.Tenant
	}
	return nil, nil, fmt.Errorf("the email '%s' exists in several tenants; nothing was changed. "+
		"Pass --tenant-id, one of:%s", c.email, tenants)
}

func (c *cli) usersDeactivate(ctx context.Context, args []string) error {
	c.userFlags()
	c.toggle(&c.yes, "y", "yes")
	st, u, err := c.findUser(ctx, args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	err = c.confirm("Deactivate %s of tenant %s in %s?", u.Email, u.Tenant, st.place)
	if err != nil {
		return err
	}
	if err := st.DeactivateUser(ctx, u); err != nil {
		return err
	}
	return c.say("Deactivated %s. All keys are refused from now on.", u.Email)
}

func (c *cli) usersActivate(ctx context.Context, args []string) error {
	c.userFlags()
	st, u, err := c.findUser(ctx, args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	if err := st.ActivateUser(ctx, u); err != nil {
		return err
	}
	return c.say("Activated %s.", u.Email)
}

func (c *cli) usersRegenerateKey(ctx context.Context, args []string) error {
	var grace span
	var expires expiry
	var quiet bool
	c.userFlags()
	c.word(&grace, "grace")
	c.word(&expires, "expires")
	c.toggle(&quiet, "q", "quiet")
	c.toggle(&c.yes, "y", "yes")
	st, u, err := c.findUser(ctx, args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	err = c.confirm("Replace all %d keys of %s of tenant %s in %s?", u.LiveKeys, u.Email, u.Tenant,
		st.place)
	if err != nil {
		return err
	}
	secret, k, digest := makeKey(u, "default", false, 0)
	if err := st.ReplaceKeys(ctx, k, digest, grace, expires); err != nil {
		return err
	}
	return c.showKey(k, secret, quiet)
}

func (c *cli) keysCreate(ctx context.Context, args []string) error {
	var name label
	var readOnly, quiet bool
	var expires expiry
	c.userFlags()
	c.word(&name, "name")
	c.toggle(&readOnly, "read-only")
	c.word(&expires, "expires")
	c.toggle(&quiet, "q", "quiet")
	st, u, err := c.findUser(ctx, args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	if name == "" {
		return wrongUsage("--name is required")
	}
	secret, k, digest := makeKey(u, string(name), readOnly, expires)
	if err := st.CreateKey(ctx, k, digest); err != nil {
		return err
	}
	return c.showKey(k, secret, quiet)
}

func (c *cli) keysList(ctx context.Context, args []string) error {
	var wantJSON bool
	c.userFlags()
	c.toggle(&wantJSON, "json")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	keys, err := st.Keys(ctx, nil, c.tenant, c.email)
	if err != nil {
		return err
	}
	if wantJSON {
		return c.printJSON(keys)
	}
	var lines [][]string
	advice := map[string]int{} // how many keys it is about
	for _, k := range keys {
		ends := k.ExpiresAt
		if ends == nil || k.RevokedAt != nil && k.RevokedAt.Before(*ends) {
			ends = k.RevokedAt
		}
		lines = append(lines, []string{
			k.ID, k.Name, k.Email,
			k.Access, k.Status,
			showTime(&k.CreatedAt), showTime(ends), showTime(k.LastUsed),
		})
		switch {
		case k.Status == statusActive && ends == nil:
			advice["Keys without an end (replace them, with --expires)"]++
		case k.Status == statusEndsSoon:
			advice["Keys that end within two weeks (replace them in time)"]++
		case k.Status == "expired":
			advice["Expired keys (revoke them; the log says whether they are still tried)"]++
		}
	}
	err = c.printTable([]string{"KEY ID", "NAME", "EMAIL", "ACCESS", "STATUS", "CREATED", "ENDS",
		"LAST USED"}, lines)
	for _, text := range slices.Sorted(maps.Keys(advice)) {
		fmt.Fprintf(c.stdout, "%s: %d\n", text, advice[text])
	}
	return err
}

func (c *cli) keysRevoke(ctx context.Context, args []string) error {
	var id string
	c.databaseFlags()
	c.text(&id, "", "key-id")
	c.toggle(&c.yes, "y", "yes")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	if id == "" {
		return wrongUsage("--key-id is required")
	}
	keys, err := st.Keys(ctx, nil, "", "")
	if err != nil {
		return err
	}
	i := slices.IndexFunc(keys, func(k key) bool { return k.ID == id })
	if i < 0 {
		return errors.New("no key has this id; see: timedb keys list")
	}
	k := &keys[i]
	err = c.confirm("Revoke the key %q of %s of tenant %s in %s, for good?", k.Name, k.Email,
		k.Tenant, st.place)
	if err != nil {
		return err
	}
	if err := st.RevokeKey(ctx, k); err != nil {
		return err
	}
	return c.say("Revoked the key %q of %s. It is refused from now on.", k.Name, k.Email)
}

func (c *cli) auditTrail(ctx context.Context, args []string) error {
	since := firstTime
	var wantJSON bool
	c.databaseFlags()
	c.word(&c.tenant, "t", "tenant-id")
	c.word((*bound)(&since), "since")
	c.toggle(&wantJSON, "json")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	trail, err := st.AuditTrail(ctx, c.tenant, since)
	if err != nil {
		return err
	}
	if wantJSON {
		return c.printJSON(trail)
	}
	var lines [][]string
	for _, e := range trail {
		at := e.At.UTC().Format(time.RFC3339)
		lines = append(lines, []string{
			at, e.Role, e.OSUser,
			e.Action, e.Tenant, e.Email, e.Detail,
		})
	}
	return c.printTable([]string{"AT", "DATABASE ROLE", "OS USER", "ACTION", "TENANT ID", "EMAIL",
		"DETAIL"}, lines)
}

// ---- The server

const maxPort = 65535 // 16 bits

// apiOptions are the flags of timedb api.
type apiOptions struct {
	host, tlsCert, tlsKey       string
	port                        int // 0: one that is free
	requireAuth, allowAnonymous bool
}

func (o *apiOptions) setPort(text string) (err error) {
	o.port, err = strconv.Atoi(text)
	if err != nil || o.port < 1 || o.port > maxPort {
		return fmt.Errorf("expected a number from 1 to %d", maxPort)
	}
	return nil
}

func (c *cli) api(ctx context.Context, args []string) error {
	o := apiOptions{port: 8000}
	c.databaseFlags()
	c.text(&o.host, "127.0.0.1", "host")
	c.flags.Func("port", "", o.setPort)
	c.text(&o.tlsCert, "", "tls-cert")
	c.text(&o.tlsKey, "", "tls-key")
	c.toggle(&o.requireAuth, "require-auth")
	c.toggle(&o.allowAnonymous, "allow-anonymous")
	if err := c.parse(args); err != nil {
		return err
	}
	if (o.tlsCert == "") != (o.tlsKey == "") {
		return wrongUsage("--tls-cert and --tls-key: expected both or none")
	}
	log := slog.New(slog.NewTextHandler(c.stderr, nil))
	st, err := c.openPool(statementTimeout, poolSize)
	if err != nil {
		return err
	}
	defer st.db.Close()
	// A busy or frozen work pool must not block authentication, so keys are looked up in a pool of
	// their own; queued authentications must not block /healthz, which has a connection of its own.
	lookups, err := c.openPool(authTimeout, lookupPool)
	if err != nil {
		return err
	}
	defer lookups.db.Close()
	health, err := c.openPool(healthTimeout, 1)
	if err != nil {
		return err
	}
	defer health.db.Close()
	auth := &authenticator{keys: lookups, requireAuth: o.requireAuth, host: o.host}
	if err := checkStart(ctx, st, auth, o, log); err != nil {
		return err
	}
	go st.watchNodes(ctx, lookups)
	return c.serve(ctx, newServer(st, health, auth, log), o, log)
}

// serve serves until ctx ends, and then lets running requests finish.
func (c *cli) serve(ctx context.Context, handler *server, o apiOptions, log *slog.Logger) error {
	srv := &http.Server{
		Handler:                      handler,
		ErrorLog:                     stdlog.New(connectionLog{handler}, "", 0),
		ConnState:                    refuseBeyond(maxConnections),
		MaxHeaderBytes:               maxURL + maxHeaders,
		ReadHeaderTimeout:            readHeaderTimeout,
		ReadTimeout:                  readTimeout,
		WriteTimeout:                 readTimeout + writeTimeout,
		IdleTimeout:                  idleTimeout,
		HTTP2:                        &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		DisableGeneralOptionsHandler: true, // or OPTIONS * would be answered without a key
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(o.host, strconv.Itoa(o.port)))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	scheme := "http"
	if o.tlsCert == "" {
		go func() { failed <- srv.Serve(listener) }()
	} else {
		scheme = "https" // crypto/tls takes no less than TLS 1.2
		go func() { failed <- srv.ServeTLS(listener, o.tlsCert, o.tlsKey) }()
	}
	fmt.Fprintf(c.stdout, "timedb serves %s://%s\n", scheme, listener.Addr())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Info("stopping: running requests may finish")
	drain, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		return fmt.Errorf("requests that had not finished after %s were cut off", drainTimeout)
	}
	return nil
}

// refuseBeyond closes connections beyond so many as soon as they come.
func refuseBeyond(limit int64) func(net.Conn, http.ConnState) {
	var connections atomic.Int64
	return func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			if connections.Add(1) > limit {
				_ = conn.Close()
			}
		case http.StateIdle:
			if connections.Load() > limit/2 {
				_ = conn.Close() // rather than keep others out
			}
		case http.StateClosed:
			connections.Add(-1)
		}
	}
}

// checkStart refuses to expose data to a network without users, latches authentication if there are
// users, and warns of what weakens the protection.
func checkStart(ctx context.Context, st *store, auth *authenticator, o apiOptions,
	log *slog.Logger) error {
	found, err := st.catalog(ctx)
	if err == nil {
		err = found.check()
	}
	if err != nil {
		return fmt.Errorf("this database cannot be served: %w", err)
	}
	hasUsers := slices.Contains(found.names, "users_table")
	auth.latched.Store(hasUsers)
	isLocal := isLoopback(o.host)
	if !hasUsers && !isLocal && !o.allowAnonymous && !o.requireAuth {
		return fmt.Errorf("there is no users_table, so everyone who reaches %s could read and "+
			"write: run timedb create tables --with-users, or pass --allow-anonymous", o.host)
	}
	if found.version == 0 {
		log.Warn("there are no tables, so requests get 503: run timedb create tables")
	}
	if !hasUsers {
		log.Warn("there is no users_table: everyone is served, or with --require-auth refused")
	}
	if !isLocal && o.tlsCert == "" {
		log.Warn("keys and data cross the network in plain text: use --tls-cert or a TLS proxy")
	}
	if st.exposed {
		log.Warn("whoever is between here and the database can listen in: use sslmode=verify-full")
	}
	if found.rewrites {
		log.Warn("the database role may rewrite data or users: it has more than --app-role grants")
	}
	if found.lacks {
		log.Warn("the database role may not read all tables: run create tables --app-role with it")
	}
	return nil
}
