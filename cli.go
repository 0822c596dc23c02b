package main

import (
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

const release = "0.9.0" // what `timedb version` and GET / tell

//go:embed docs/usage.txt
var usage string // the manual: an overview, and for each command a section

// cli is one invocation: what it is to do, where it reads and writes, and the values of its flags.
type cli struct {
	command
	env            func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer

	dsn, schema, email, appRole, host, tlsCert, tlsKey                                       string
	withUsers, citus, dryRun, yes, quiet, inactive, asJSON, readOnly, requireAuth, anonymous bool
	tenant                                                                                   uuid
	expires                                                                                  expiry
	grace                                                                                    span
	port                                                                                     int
}

// command is one line of the command table. "!" marks flags that must be given.
type command struct {
	name, flagNames string
	run             func(c *cli, ctx context.Context, st *store) error
}

var commands = []command{
	{"create tables", "d dsn s schema with-users app-role citus dry-run y yes", (*cli).createTables},
	{"delete tables", "d dsn s schema y yes", (*cli).deleteTables},
	{"users create", "d dsn s schema t tenant-id! e email! read-only expires q quiet", (*cli).usersCreate},
	{"users list", "d dsn s schema t tenant-id include-inactive json", (*cli).usersList},
	{"users deactivate", "d dsn s schema e email! t tenant-id y yes", (*cli).changeUser},
	{"users activate", "d dsn s schema e email! t tenant-id", (*cli).changeUser},
	{"users regenerate-key", "d dsn s schema e email! t tenant-id grace expires q quiet y yes", (*cli).changeUser},
	{"api", "d dsn s schema host port tls-cert tls-key require-auth allow-anonymous", (*cli).api},
	{"version", "", func(c *cli, _ context.Context, _ *store) error { return c.report(nil, "timedb %s\n", release) }},
}

// flags returns those of the command. Parsing them sets c's fields, which until then keep what they hold.
func (c *cli) flags() *flag.FlagSet {
	fields := map[string]any{"dsn": &c.dsn, "schema": &c.schema, "tenant-id": &c.tenant, "email": &c.email, "yes": &c.yes,
		"quiet": &c.quiet, "with-users": &c.withUsers, "app-role": &c.appRole, "citus": &c.citus, "dry-run": &c.dryRun,
		"include-inactive": &c.inactive, "json": &c.asJSON, "read-only": &c.readOnly, "expires": &c.expires, "grace": &c.grace, "host": &c.host,
		"port": &c.port, "tls-cert": &c.tlsCert, "tls-key": &c.tlsKey, "require-auth": &c.requireAuth, "allow-anonymous": &c.anonymous}
	set := flag.NewFlagSet("", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	long := map[string]string{"d": "dsn", "s": "schema", "t": "tenant-id", "e": "email", "y": "yes", "q": "quiet"}
	for _, spelling := range strings.Fields(strings.ReplaceAll(c.flagNames, "!", "")) {
		name := cmp.Or(long[spelling], spelling)
		switch field := fields[name].(type) {
		case *string:
			set.StringVar(field, spelling, *field, "")
		case *bool:
			set.BoolVar(field, spelling, *field, "")
		case *int:
			set.IntVar(field, spelling, *field, "")
		default:
			set.Func(spelling, "", func(text string) error { return inputError("--"+name, setField(field, []byte(text))) })
		}
	}
	return set
}

// run carries out one command line and returns the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, env func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{env: env, stdin: stdin, stdout: stdout, stderr: stderr, schema: "public", host: "127.0.0.1", port: 8000}
	err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		_, section, _ := strings.Cut("== \n"+usage, "== "+c.name+"\n") // of no command: the overview
		section, _, _ = strings.Cut(section, "\n== ")
		fmt.Fprintln(stdout, strings.TrimSpace(section))
		return 0
	}
	if err != nil && strings.ContainsAny(err.Error(), "@=/") {
		err = errors.New("the command line is not understood") // and not repeated: it seems to hold a DSN
	}
	if err = cmp.Or(err, c.check()); err != nil {
		fmt.Fprintf(stderr, "ERROR: %v; see: timedb %s\n", err, strings.TrimSpace("help "+c.name))
		return 2
	}
	if err := c.execute(ctx); err != nil {
		fmt.Fprintln(stderr, "ERROR:", err)
		return 1
	}
	return 0
}

// parse finds the command and reads its flags. Its errors are flag.ErrHelp, and sentences that repeat what was typed.
func (c *cli) parse(args []string) error {
	line := strings.Join(args, " ")
	for _, cmd := range commands {
		words := strings.Fields(cmd.name)
		if line == "help "+cmd.name || slices.Equal(args[:min(len(args), len(words))], words) {
			c.command, args = cmd, args[len(words):]
			break
		}
	}
	if slices.Contains([]string{"", "-h", "--help", "help", "help " + c.name}, line) {
		return flag.ErrHelp
	}
	if c.name == "" {
		return fmt.Errorf("unknown command %q", line)
	}
	set := c.flags()
	if err := set.Parse(args); err != nil || set.NArg() == 0 {
		return err
	}
	return fmt.Errorf("unexpected argument %q", set.Arg(0))
}

// check refuses what cannot be meant, before anything is done.
func (c *cli) check() error {
	c.dsn = cmp.Or(c.dsn, c.env("TIMEDB_DSN"), c.env("DATABASE_URL"))
	c.email = strings.TrimSpace(c.email)
	user, domain, _ := strings.Cut(c.email, "@")
	return cmp.Or(
		invalidIf(c.tenant == "" && strings.Contains(c.flagNames, "tenant-id!"), "--tenant-id is required"),
		invalidIf(c.email == "" && strings.Contains(c.flagNames, "email!"), "--email is required"),
		invalidIf(c.name == "users create" && (user == "" || domain == "" || new(label).UnmarshalText([]byte(c.email)) != nil),
			"--email: expected an address such as alice@example.com"),
		invalidIf((c.tlsCert == "") != (c.tlsKey == ""), "--tls-cert and --tls-key: expected both or none"),
		invalidIf(c.dsn == "" && c.flagNames != "" && !c.dryRun, "no database: give --dsn, or set TIMEDB_DSN or DATABASE_URL"))
}

// execute runs the command, with a store if it needs one.
func (c *cli) execute(ctx context.Context) error {
	if c.flagNames == "" || c.dryRun {
		return c.run(c, ctx, nil)
	}
	st, err := openStore(c.dsn, c.schema, map[string]time.Duration{"api": statementTimeout}[c.name], poolSize) // others: 0, no timeout
	if err != nil {
		return err
	}
	defer st.db.Close()
	if err = c.run(c, ctx, st); sqlState(err) == "42P01" {
		return errors.New("there is no users_table: run timedb create tables --with-users")
	}
	return err
}

// report prints what was done, unless err says that it was not.
func (c *cli) report(err error, format string, args ...any) error {
	if err == nil {
		_, err = fmt.Fprintf(c.stdout, format, args...)
	}
	return err
}

// confirm asks unless -y was given. Anything but yes, and nobody to ask, is an error.
func (c *cli) confirm(question string, args ...any) error {
	if c.yes {
		return nil
	}
	fmt.Fprintf(c.stderr, question+" [y/N] ", args...)
	answer := ""
	if _, err := fmt.Fscanln(c.stdin, &answer); err == nil && slices.Contains([]string{"y", "yes"}, strings.ToLower(answer)) {
		return nil
	}
	return errors.New("not confirmed; nothing was changed. Pass -y to do it without asking")
}

func (c *cli) createTables(ctx context.Context, st *store) (err error) {
	var before catalog
	if !c.dryRun {
		before, err = st.catalog(ctx)
	}
	if err != nil || before.version > schemaVersion {
		return cmp.Or(err, before.check())
	}
	users := c.withUsers || slices.Contains(before.names, "users_table")
	text := schemaSections(c.schema, c.appRole, map[string]bool{"begin": true, "tables": true, "citus": c.citus,
		"users":   c.withUsers || users && before.version == 1, // which then lacks columns
		"upgrade": before.version < schemaVersion, "app role": c.appRole != "", "app role with users": c.appRole != "" && users})
	if c.dryRun {
		return c.report(nil, "BEGIN;\n%sCOMMIT;\n", text)
	}
	if err := c.confirm("Create timedb's tables in schema %q?", c.schema); err != nil {
		return err
	}
	if err := st.exec(ctx, text); err != nil {
		return err
	}
	after, err := st.catalog(ctx)
	for _, name := range after.names {
		state := map[bool]string{true: "exists", false: "created"}[slices.Contains(before.names, name)]
		fmt.Fprintf(c.stdout, "%-8s %s.%s\n", state, c.schema, name)
	}
	return err
}

func (c *cli) deleteTables(ctx context.Context, st *store) error {
	before, err := st.catalog(ctx)
	if err != nil || len(before.names) == 0 {
		return c.report(err, "There is nothing of timedb in schema %q.\n", c.schema)
	}
	names := strings.Join(before.names, ", ")
	if err := c.confirm("Delete %s in schema %q, with ALL data?", names, c.schema); err != nil {
		return err
	}
	return c.report(st.exec(ctx, schemaSections(c.schema, "", map[string]bool{"delete": true})), "deleted  %s\n", names)
}

func (c *cli) usersCreate(ctx context.Context, st *store) error {
	key, id, digest := newKey()
	u := &user{Tenant: string(c.tenant), Email: c.email, KeyID: id, Access: map[bool]string{true: "ro", false: "rw"}[c.readOnly]}
	return c.showKey(st.CreateUser(ctx, u, digest, c.expires), u, key)
}

// showKey prints a new key, once: it is stored nowhere. err tells why there is none.
func (c *cli) showKey(err error, u *user, key string) error {
	if c.quiet {
		return c.report(err, "%s\n", key)
	}
	return c.report(err, "User ID: %s\nTenant ID: %s\nEmail: %s\nAccess: %s\nExpires: %s\nAPI Key: %s\n"+
		"The key will not be shown again: keep it now.\n", u.ID, u.Tenant, u.Email, u.Access, showTime(u.ExpiresAt), key)
}

func (c *cli) usersList(ctx context.Context, st *store) error {
	users, err := st.Users(ctx, string(c.tenant), "")
	if err != nil {
		return err
	}
	if c.asJSON {
		text, err := json.MarshalIndent(users, "", "  ")
		return c.report(err, "%s\n", text)
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "EMAIL\tTENANT ID\tUSER ID\tKEY ID\tACCESS\tSTATUS\tEXPIRES\tLAST USED\tCREATED")
	for _, u := range users {
		fmt.Fprintln(w, strings.Join([]string{u.Email, u.Tenant, u.ID, u.KeyID, u.Access, u.Status,
			showTime(u.ExpiresAt), showTime(u.LastUsed), showTime(&u.CreatedAt)}, "\t"))
	}
	return w.Flush()
}

func showTime(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

// changeUser is users deactivate, activate and regenerate-key: it changes the one user that --email and --tenant-id name.
func (c *cli) changeUser(ctx context.Context, st *store) error {
	users, err := st.Users(ctx, string(c.tenant), c.email)
	if err != nil {
		return err
	}
	tenants := ""
	for _, u := range users {
		tenants += "\n  " + u.Tenant
	}
	switch {
	case len(users) == 0:
		return fmt.Errorf("no user has the email '%s'; see: timedb users list", c.email)
	case len(users) > 1:
		return fmt.Errorf("the email '%s' exists in several tenants; nothing was changed. Pass --tenant-id, one of:%s", c.email, tenants)
	case c.name == "users regenerate-key" && users[0].Status == "expired" && c.expires == 0:
		return errors.New("the user has expired, and with it any key: pass --expires")
	}
	u := &users[0]
	if c.name == "users activate" {
		return c.report(st.SetActive(ctx, u.ID, true), "Activated %s.\n", u.Email)
	}
	verb := map[string]string{"users deactivate": "Deactivate", "users regenerate-key": "Replace the key of"}[c.name]
	if err := c.confirm("%s %s of tenant %s?", verb, u.Email, u.Tenant); err != nil {
		return err
	}
	if c.name == "users deactivate" {
		return c.report(st.SetActive(ctx, u.ID, false), "Deactivated %s. The key is refused from now on.\n", u.Email)
	}
	key, id, digest := newKey()
	return c.showKey(st.ReplaceKey(ctx, u, id, digest, c.grace, c.expires), u, key)
}

func (c *cli) api(ctx context.Context, st *store) error {
	log := slog.New(slog.NewTextHandler(c.stderr, nil))
	// Keys are looked up in a pool of their own, and health by a connection of its own: what is at work, or waits for a frozen
	// database, keeps no one from being judged, and a crowd to be judged keeps no one from asking whether it is well.
	lookups, err := openStore(c.dsn, c.schema, lookupTimeout, lookupPool)
	if err != nil {
		return err
	}
	defer lookups.db.Close()
	health, err := openStore(c.dsn, c.schema, lookupTimeout, 1)
	if err != nil {
		return err
	}
	defer health.db.Close()
	auth := &authenticator{keys: lookups, usersTableExists: lookups.usersTableExists, touch: lookups.TouchKey,
		requireAuth: c.requireAuth, host: c.host}
	if err := c.checkStart(ctx, st, auth, log); err != nil {
		return err
	}
	srv := &http.Server{
		Handler:  newServer(st, health.usersTableExists, auth, log),
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), MaxHeaderBytes: maxHeaderBytes,
		ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: readTimeout + writeTimeout, IdleTimeout: idleTimeout,
		DisableGeneralOptionsHandler: true, // or OPTIONS * would be answered without a key
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(c.host, fmt.Sprint(c.port)))
	if err != nil {
		return err
	}
	scheme, serve := "http", srv.Serve
	if c.tlsCert != "" { // crypto/tls takes no less than TLS 1.2
		scheme, serve = "https", func(l net.Listener) error { return srv.ServeTLS(l, c.tlsCert, c.tlsKey) }
	}
	failed := make(chan error, 1)
	go func() { failed <- serve(listener) }()
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

// checkStart refuses to expose data to a network without users, and warns of what weakens the protection.
func (c *cli) checkStart(ctx context.Context, st *store, auth *authenticator, log *slog.Logger) error {
	found, err := st.catalog(ctx)
	if err = cmp.Or(err, found.check()); err != nil {
		return fmt.Errorf("this database cannot be served: %w", err)
	}
	exists := slices.Contains(found.names, "users_table")
	auth.latched.Store(exists)
	local := isLoopback(c.host)
	if !exists && !local && !c.anonymous && !c.requireAuth {
		return fmt.Errorf("there is no users_table, so everyone who reaches %s could read and write: "+
			"run timedb create tables --with-users, or pass --allow-anonymous", c.host)
	}
	warnIf := func(weak bool, text string) {
		if weak {
			log.Warn(text)
		}
	}
	warnIf(found.version == 0, "there are no tables, so requests get 503: run timedb create tables")
	warnIf(!exists, "there is no users_table: everyone is served, or with --require-auth refused")
	warnIf(!local && c.tlsCert == "", "keys and data cross the network in plain text: use --tls-cert, or put a TLS proxy in front")
	warnIf(st.exposed, "whoever is between here and the database can listen in: use sslmode=verify-full")
	warnIf(found.rewrites, "the database role may rewrite data or users: use one that has what create tables --app-role grants")
	return nil
}
