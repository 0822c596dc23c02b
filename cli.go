package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// usage is the manual: an overview, and for each command a section.
//
//go:embed docs/usage.txt
var usage string

// cli is one invocation: what it is to do, where it reads and writes, and the values of its flags.
type cli struct {
	command
	env            func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer

	dsn, schema, tenant, email, appRole, host                               string
	withUsers, dryRun, yes, quiet, inactive, asJSON, requireAuth, anonymous bool
	port                                                                    int
}

// command is one line of the command table. flagNames marks with "!" what must be given. Whatever has flags gets a store,
// and the database ends a statement of it after timeout; 0 is never.
type command struct {
	name, flagNames string
	timeout         time.Duration
	run             func(c *cli, ctx context.Context, st *store) error
}

var commands = []command{
	{"create tables", "dsn schema with-users app-role dry-run yes", 0, (*cli).createTables},
	{"delete tables", "dsn schema yes", 0, (*cli).deleteTables},
	{"users create", "dsn schema tenant-id! email! quiet", 0, (*cli).usersCreate},
	{"users list", "dsn schema tenant-id include-inactive json", 0, (*cli).usersList},
	{"users deactivate", "dsn schema email! tenant-id yes", 0, (*cli).changeUser},
	{"users activate", "dsn schema email! tenant-id", 0, (*cli).changeUser},
	{"users regenerate-key", "dsn schema email! tenant-id quiet yes", 0, (*cli).changeUser},
	{"api", "dsn schema host port require-auth allow-anonymous", statementTimeout, (*cli).api},
	{"version", "", 0, func(c *cli, _ context.Context, _ *store) error {
		return c.report(nil, "timedb %s\n", versionOf())
	}},
}

// flags returns those of the command. Parsing them sets c's fields, which until then keep what they hold.
func (c *cli) flags() *flag.FlagSet {
	fields := map[string]any{"dsn": &c.dsn, "schema": &c.schema, "tenant-id": &c.tenant, "email": &c.email, "yes": &c.yes, "quiet": &c.quiet,
		"with-users": &c.withUsers, "app-role": &c.appRole, "dry-run": &c.dryRun, "include-inactive": &c.inactive, "json": &c.asJSON,
		"host": &c.host, "port": &c.port, "require-auth": &c.requireAuth, "allow-anonymous": &c.anonymous}
	set := flag.NewFlagSet("", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	for _, name := range strings.Fields(strings.ReplaceAll(c.flagNames, "!", "")) {
		spellings := []string{name}
		if slices.Contains([]string{"dsn", "schema", "tenant-id", "email", "yes", "quiet"}, name) {
			spellings = append(spellings, name[:1])
		}
		for _, spelling := range spellings {
			switch field := fields[name].(type) {
			case *string:
				set.StringVar(field, spelling, *field, "")
			case *bool:
				set.BoolVar(field, spelling, *field, "")
			case *int:
				set.IntVar(field, spelling, *field, "")
			}
		}
	}
	return set
}

// run carries out one command line and returns the exit code: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, env func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{env: env, stdin: stdin, stdout: stdout, stderr: stderr, schema: "public", host: "127.0.0.1", port: 8000}
	err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		c.help()
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
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	return nil
}

// check refuses what cannot be meant, before anything is done.
func (c *cli) check() error {
	c.dsn = cmp.Or(c.dsn, c.env("TIMEDB_DSN"), c.env("DATABASE_URL"))
	c.email = strings.TrimSpace(c.email)
	user, domain, _ := strings.Cut(c.email, "@")
	var err error
	if c.tenant != "" {
		err = inputError("--tenant-id", (*uuid)(&c.tenant).UnmarshalText([]byte(c.tenant)))
	}
	switch {
	case c.tenant == "" && strings.Contains(c.flagNames, "tenant-id!"):
		return errors.New("--tenant-id is required")
	case c.email == "" && strings.Contains(c.flagNames, "email!"):
		return errors.New("--email is required")
	case c.name == "users create" && (user == "" || domain == "" || new(label).UnmarshalText([]byte(c.email)) != nil):
		return errors.New("--email: expected an address such as alice@example.com")
	case err == nil && c.dsn == "" && c.flagNames != "" && !c.dryRun:
		return errors.New("no database: give --dsn, or set TIMEDB_DSN or DATABASE_URL")
	}
	return err
}

// execute runs the command, with a store whose database answers if it needs one.
func (c *cli) execute(ctx context.Context) error {
	if c.flagNames == "" || c.dryRun {
		return c.run(c, ctx, nil)
	}
	st, err := openStore(c.dsn, c.schema, c.timeout)
	if err != nil {
		return err
	}
	defer st.db.Close()
	if err := st.db.PingContext(ctx); err != nil {
		return fmt.Errorf("cannot use the database: %w", err)
	}
	if err = c.run(c, ctx, st); sqlState(err) == "42P01" {
		return errors.New("there is no users_table: run timedb create tables --with-users")
	}
	return err
}

// help prints the manual's section on the command, or its overview if none was named.
func (c *cli) help() {
	_, section, _ := strings.Cut("== \n"+usage, "== "+c.name+"\n")
	section, _, _ = strings.Cut(section, "\n== ")
	fmt.Fprintln(c.stdout, strings.TrimSpace(section))
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
	_, err := fmt.Fscanln(c.stdin, &answer)
	if answer = strings.ToLower(answer); err != nil || answer != "y" && answer != "yes" {
		return errors.New("not confirmed; nothing was changed. Pass -y to do it without asking")
	}
	return nil
}

func (c *cli) createTables(ctx context.Context, st *store) error {
	sections := []string{"begin", "tables"}
	if c.withUsers {
		sections = append(sections, "users")
	}
	if c.appRole != "" {
		sections = append(sections, "app role")
	}
	text := schemaSections(c.schema, c.appRole, sections...)
	if c.dryRun {
		return c.report(nil, "BEGIN;\n%sCOMMIT;\n", text)
	}
	before, err := st.relations(ctx)
	if err != nil {
		return err
	}
	if err := c.confirm("Create timedb's tables in schema %q?", c.schema); err != nil {
		return err
	}
	if err := st.exec(ctx, text); err != nil {
		return err
	}
	after, err := st.relations(ctx)
	if err != nil {
		return err
	}
	for _, name := range after {
		state := map[bool]string{true: "exists", false: "created"}[slices.Contains(before, name)]
		fmt.Fprintf(c.stdout, "%-8s %s.%s\n", state, c.schema, name)
	}
	if !slices.Contains(after, "users_table") {
		fmt.Fprintln(c.stdout, "There is no users_table: the API serves everyone without a key. Run with --with-users to change that.")
	}
	return nil
}

func (c *cli) deleteTables(ctx context.Context, st *store) error {
	before, err := st.relations(ctx)
	if err != nil || len(before) == 0 {
		return c.report(err, "There is nothing of timedb in schema %q.\n", c.schema)
	}
	names := strings.Join(before, ", ")
	if err := c.confirm("Delete %s in schema %q, with ALL data?", names, c.schema); err != nil {
		return err
	}
	return c.report(st.exec(ctx, schemaSections(c.schema, "", "delete")), "deleted  %s\n", names)
}

func (c *cli) usersCreate(ctx context.Context, st *store) error {
	key, id := newKey()
	digest := sha256.Sum256([]byte(key))
	u := &user{Tenant: c.tenant, Email: c.email, KeyID: id, Access: "rw"}
	return c.showKey(st.CreateUser(ctx, u, digest[:]), u, key)
}

// showKey prints a new key, once: it is stored nowhere. err tells why there is none.
func (c *cli) showKey(err error, u *user, key string) error {
	if c.quiet {
		return c.report(err, "%s\n", key)
	}
	return c.report(err, "User ID: %s\nTenant ID: %s\nEmail: %s\nAccess: %s\nAPI Key: %s\n"+
		"The key will not be shown again: keep it now.\n", u.ID, u.Tenant, u.Email, u.Access, key)
}

func (c *cli) usersList(ctx context.Context, st *store) error {
	users, err := st.Users(ctx, c.tenant, "")
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
		status := map[bool]string{true: "active", false: "inactive"}[u.Active]
		fmt.Fprintln(w, strings.Join([]string{u.Email, u.Tenant, u.ID, u.KeyID, u.Access, status,
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
	users, err := st.Users(ctx, c.tenant, c.email)
	if err != nil {
		return err
	}
	tenants := ""
	for _, u := range users {
		tenants += "\n  " + u.Tenant
	}
	if len(users) == 0 {
		return fmt.Errorf("no user has the email '%s'", c.email)
	}
	if len(users) > 1 {
		return fmt.Errorf("the email '%s' exists in several tenants; nothing was changed. Pass --tenant-id, one of:%s", c.email, tenants)
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
	key, id := newKey()
	digest := sha256.Sum256([]byte(key))
	return c.showKey(st.ReplaceKey(ctx, u.ID, id, digest[:]), u, key)
}

func (c *cli) api(ctx context.Context, st *store) error {
	utc := func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindTime {
			a.Value = slog.TimeValue(a.Value.Time().UTC())
		}
		return a
	}
	log := slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{ReplaceAttr: utc}))
	auth := &authenticator{keys: st, usersTableExists: st.usersTableExists, touch: st.TouchKey, requireAuth: c.requireAuth, host: c.host}
	if err := c.checkStart(ctx, auth, log); err != nil {
		return err
	}
	srv := &http.Server{
		Handler: newServer(st, auth, log), ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn), MaxHeaderBytes: maxHeaderBytes,
		ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: readTimeout + writeTimeout, IdleTimeout: idleTimeout,
		DisableGeneralOptionsHandler: true, // or OPTIONS * would be answered without a key
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(c.host, strconv.Itoa(c.port)))
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(listener) }()
	fmt.Fprintf(c.stdout, "timedb serves http://%s\n", listener.Addr())
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

// checkStart refuses to expose data to a network without users.
func (c *cli) checkStart(ctx context.Context, auth *authenticator, log *slog.Logger) error {
	exists, err := auth.usersTableExists(ctx)
	if err != nil {
		return fmt.Errorf("cannot find out whether users_table exists: %w", err)
	}
	auth.latched.Store(exists)
	local := isLoopback(c.host)
	if !exists && !local && !c.anonymous && !c.requireAuth {
		return fmt.Errorf("there is no users_table, so everyone who reaches %s could read and write: "+
			"run timedb create tables --with-users, or pass --allow-anonymous", c.host)
	}
	if !exists {
		log.Warn("there is no users_table", "schema", c.schema, "everyone_is_refused", c.requireAuth)
	}
	if !local {
		log.Warn("keys and data cross the network in plain text: put a TLS proxy in front", "host", c.host)
	}
	return nil
}

// versionOf is the module's version as the Go toolchain recorded it.
func versionOf() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return strings.Trim(info.Main.Version, "()")
	}
	return "devel"
}
