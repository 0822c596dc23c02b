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
	"log/slog"
	"net"
	"net/http"
	"os"
	osuser "os/user"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

const release = "0.9.0" // what `timedb version` and GET / tell

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
		{"users create", (*cli).usersCreate},
		{"users list", (*cli).usersList},
		{"users deactivate", (*cli).usersDeactivate},
		{"users activate", (*cli).usersActivate},
		{"users regenerate-key", (*cli).usersRegenerateKey},
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
		err = errors.New("there is no users_table: run timedb create tables --with-users")
	}
	fmt.Fprintln(stderr, "ERROR:", err)
	return 1
}

// manual returns the section on a command, or the overview.
func manual(name string) string {
	_, section, _ := strings.Cut("== \n"+usage, "== "+name+"\n")
	section, _, _ = strings.Cut(section, "\n== ")
	return strings.TrimSpace(section)
}

// dispatch finds the command and runs it. It returns the command's name, "" if there is none.
func (c *cli) dispatch(ctx context.Context, args []string) (name string, err error) {
	line := strings.Join(args, " ")
	if slices.Contains([]string{"", "-h", "--help", "help"}, line) {
		return "", flag.ErrHelp
	}
	for _, cmd := range commands() {
		if line == "help "+cmd.name {
			return cmd.name, flag.ErrHelp
		}
		words := strings.Fields(cmd.name)
		if len(args) >= len(words) && slices.Equal(args[:len(words)], words) {
			return cmd.name, cmd.run(c, ctx, args[len(words):])
		}
	}
	return "", mistyped(fmt.Errorf("unknown command %q", line))
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
	return mistyped(err)
}

// open reads the flags and opens the store that they name, for the command alone.
func (c *cli) open(args []string) (*store, error) {
	if err := c.parse(args); err != nil {
		return nil, err
	}
	return c.openPool(0, 1)
}

// openPool opens a store with so many connections, on which a statement ends after timeout; 0 means
// never. The DSN is that of the flag or of the environment.
func (c *cli) openPool(timeout time.Duration, connections int) (*store, error) {
	dsn := c.dsn
	for _, name := range []string{"TIMEDB_DSN", "DATABASE_URL"} {
		if dsn == "" {
			dsn = c.env(name)
		}
	}
	if dsn == "" {
		return nil, wrongUsage("no database: give --dsn, or set TIMEDB_DSN or DATABASE_URL")
	}
	st, err := openStore(dsn, c.schema, timeout, connections, c.stderr)
	if err != nil {
		return nil, err
	}
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
	st, err := c.openPool(0, 1)
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
	if err := c.confirm("Create timedb's tables in schema %q?", c.schema); err != nil {
		return err
	}
	err = st.exec(ctx, tableSections(c.schema, before, withUsers, citus, role))
	if err != nil {
		return err
	}
	after, err := st.catalog(ctx)
	for _, name := range after.names {
		state := "created"
		if slices.Contains(before.names, name) {
			state = "exists"
		}
		fmt.Fprintf(c.stdout, "%-8s %s.%s\n", state, c.schema, name)
	}
	return err
}

// tableSections is the SQL that makes of what there is what there should be.
func tableSections(schema string, before catalog, withUsers, citus bool, role string) string {
	hasUsers := withUsers || slices.Contains(before.names, "users_table")
	return schemaSections(schema, role, map[string]bool{
		"begin":  true,
		"tables": true,
		// Those of version 1 lack columns of users_table.
		"users":               withUsers || hasUsers && before.version == 1,
		"citus":               citus,
		"upgrade":             before.version < schemaVersion,
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
	names := strings.Join(before.names, ", ")
	err = c.confirm("Delete %s in schema %q, with ALL data?", names, c.schema)
	if err != nil {
		return err
	}
	err = st.exec(ctx, schemaSections(c.schema, "", map[string]bool{"delete": true}))
	if err != nil {
		return err
	}
	return c.say("deleted  %s", names)
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
	st, err := c.openPool(0, 1)
	if err != nil {
		return err
	}
	defer st.db.Close()
	key, id, digest := newKey()
	u := user{Tenant: string(c.tenant), Email: c.email, KeyID: id, Access: "rw"}
	if readOnly {
		u.Access = "ro"
	}
	if err := st.CreateUser(ctx, &u, digest, expires); err != nil {
		return err
	}
	return c.showKey(&u, key, quiet)
}

// showKey prints a new key, once: it is stored nowhere.
func (c *cli) showKey(u *user, key string, quiet bool) error {
	if quiet {
		return c.say("%s", key)
	}
	return c.say("User ID: %s\nTenant ID: %s\nEmail: %s\nAccess: %s\nExpires: %s\n"+
		"API Key: %s\nThe key will not be shown again: keep it now.",
		u.ID, u.Tenant, u.Email, u.Access, showTime(u.ExpiresAt), key)
}

func showTime(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

func (c *cli) usersList(ctx context.Context, args []string) error {
	var withInactive, printJSON bool
	c.databaseFlags()
	c.word(&c.tenant, "t", "tenant-id")
	c.toggle(&withInactive, "include-inactive") // accepted for scripts; they are listed anyway
	c.toggle(&printJSON, "json")
	st, err := c.open(args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	users, err := st.Users(ctx, c.tenant, "")
	if err != nil {
		return err
	}
	if printJSON {
		out := json.NewEncoder(c.stdout)
		out.SetIndent("", "  ")
		return out.Encode(users)
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w,
		"EMAIL\tTENANT ID\tUSER ID\tKEY ID\tACCESS\tSTATUS\tEXPIRES\tLAST USED\tCREATED")
	for _, u := range users {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			u.Email, u.Tenant, u.ID, u.KeyID, u.Access, u.Status,
			showTime(u.ExpiresAt), showTime(u.LastUsed), showTime(&u.CreatedAt))
	}
	return w.Flush()
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
	if err := c.confirm("Deactivate %s of tenant %s?", u.Email, u.Tenant); err != nil {
		return err
	}
	if err := st.DeactivateUser(ctx, u.ID); err != nil {
		return err
	}
	return c.say("Deactivated %s. The key is refused from now on.", u.Email)
}

func (c *cli) usersActivate(ctx context.Context, args []string) error {
	c.userFlags()
	st, u, err := c.findUser(ctx, args)
	if err != nil {
		return err
	}
	defer st.db.Close()
	if err := st.ActivateUser(ctx, u.ID); err != nil {
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
	if u.Status == "expired" && expires == 0 {
		return errors.New("the user has expired, and with it any key: pass --expires")
	}
	if err := c.confirm("Replace the key of %s of tenant %s?", u.Email, u.Tenant); err != nil {
		return err
	}
	key, id, digest := newKey()
	if err := st.ReplaceKey(ctx, u, id, digest, grace, expires); err != nil {
		return err
	}
	return c.showKey(u, key, quiet)
}

// ---- The server

// apiOptions are the flags of timedb api.
type apiOptions struct {
	host, tlsCert, tlsKey       string
	port                        int
	requireAuth, allowAnonymous bool
}

func (c *cli) api(ctx context.Context, args []string) error {
	var o apiOptions
	c.databaseFlags()
	c.text(&o.host, "127.0.0.1", "host")
	c.flags.IntVar(&o.port, "port", 8000, "")
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
	return c.serve(ctx, newServer(st, health, auth, log), o, log)
}

// serve serves until ctx ends, and then lets running requests finish.
func (c *cli) serve(ctx context.Context, handler http.Handler, o apiOptions,
	log *slog.Logger) error {
	srv := &http.Server{
		Handler:                      handler,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelWarn),
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
	return srv.Shutdown(drain)
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

// checkStart refuses to expose data to a network without users, and warns of what weakens the
// protection.
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
		log.Warn("keys and data cross the network in plain text: use --tls-cert, or put a TLS " +
			"proxy in front")
	}
	if st.exposed {
		log.Warn("whoever is between here and the database can listen in: use sslmode=verify-full")
	}
	if found.rewrites {
		log.Warn("the database role may rewrite data or users: use one that has what " +
			"create tables --app-role grants")
	}
	return nil
}
