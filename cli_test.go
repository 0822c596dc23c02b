package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"flag"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lib/pq"
)

func TestDSNComesFromFlagThenTimedbDSNThenDatabaseURL(t *testing.T) {
	t.Parallel()
	good, bad := mustDatabase(t), "postgresql://u:hunter2@127.0.0.1:1/nowhere"
	for _, c := range []struct {
		flag, timedb, database string
		code                   int
	}{
		{good, bad, bad, 0}, {"", good, bad, 0}, {"", "", good, 0},
		{bad, good, good, 1}, {"", bad, good, 1}, {"", "", bad, 1}, {"", "", "", 2},
	} {
		args := []string{"create", "tables", "-y"}
		if c.flag != "" {
			args = append(args, "--dsn", c.flag)
		}
		code, stdout, stderr := runIn(map[string]string{"TIMEDB_DSN": c.timedb, "DATABASE_URL": c.database}, "", args...)
		if code != c.code {
			t.Errorf("%v: exit %d, want %d: %s", c, code, c.code, stderr)
		}
		if strings.Contains(stdout+stderr, "hunter2") {
			t.Errorf("the password was printed: %s%s", stdout, stderr)
		}
		for _, name := range []string{"ERROR:", "--dsn", "TIMEDB_DSN", "DATABASE_URL"} {
			if c.code == 2 && !strings.Contains(stderr, name) {
				t.Errorf("without a DSN stderr is %q, want %s in it", stderr, name)
			}
		}
	}
}

func TestPasswordOfADSNIsNeverPrinted(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgresql://u:hunter2@127.0.0.1:1/db", "postgresql://u:hunter2@x@127.0.0.1:1/db", "postgresql://u:x@hunter2@127.0.0.1:1/db",
		"postgresql://u:hunter2/x@127.0.0.1:1/db", "postgresql://u:x/hunter2@127.0.0.1:1/db", "postgresql://u:hunter2?x@127.0.0.1:1/db",
		"postgresql://u:x?hunter2@127.0.0.1:1/db", "postgresql://u:hunter2#x@127.0.0.1:1/db", "postgresql://u:x#hunter2@127.0.0.1:1/db",
		"postgresql://localhost:1/hunter2@127.0.0.1:1/db", "postgresql://localhost:1?hunter2@127.0.0.1:1/db",
		"postgresql://localhost:1#hunter2@127.0.0.1:1/db", "postgresql://u:%zzhunter2@127.0.0.1:1/db",
		"postgresql://u:hunter2@127.0.0.1:port/db",
		"postgresql://u:hunter2@127.0.0.1:1/db?sslmode=perhaps", "postgresql://u:hunter2@127.0.0.1:1/db?connect_timeout=soon",
		"postgresql://u:hunter2@[::1/db", "postgresql://u:hunter2 x@127.0.0.1:1/db", "postgresql://u:hunter2\n@127.0.0.1:1/db",
		"hunter2", "host=127.0.0.1 port=1 password='hunter2", "host=127.0.0.1 port=x password=hunter2", "password = hunter2 port",
		"host=127.0.0.1 port=1 password=x hunter2", "postgresql://u:x@127.0.0.1:1/db?password=hunter2&port=x",
		"mysql://u:hunter2@127.0.0.1:1/db",
	} {
		for _, args := range [][]string{{"users", "list"}, {"api", "--port", "0"}} {
			code, stdout, stderr := runIn(map[string]string{"DATABASE_URL": dsn}, "", args...)
			if code == 0 || strings.Contains(stdout+stderr, "hunter2") {
				t.Errorf("DSN %q: exit %d, printed %q", dsn, code, stdout+stderr)
			}
		}
	}
}

func TestMisplacedDSNIsNotRepeated(t *testing.T) {
	t.Parallel()
	const dsn = "postgresql://u:hunter2@127.0.0.1:1/db"
	for _, args := range [][]string{{"-d", dsn, "api"}, {"create", "tables", dsn}, {"create", "tables", "-d" + dsn}, {dsn},
		{"api", "--port", "postgresql://127.0.0.1:1/db?password=hunter2"}} {
		code, stdout, stderr := runIn(nil, "", args...)
		if code != 2 || stderr == "" || strings.Contains(stdout+stderr, "hunter2") {
			t.Errorf("%q: exit %d, printed %q", args, code, stdout+stderr)
		}
	}
}

func TestPasswordMayStandInAFile(t *testing.T) { // S29
	dsn := mustDatabase(t)
	u := mustParse(t, dsn)
	password, _ := u.User.Password()
	file := filepath.Join(t.TempDir(), "pgpass")
	if err := os.WriteFile(file, []byte("*:*:*:*:"+password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PGPASSFILE", file)
	u.User = url.User(u.User.Username())
	mustRun(t, 0, u.String(), "", "create", "tables", "-y")
	t.Setenv("PGPASSFILE", filepath.Join(t.TempDir(), "none"))
	if password != "" {
		mustRun(t, 1, u.String(), "", "create", "tables", "-y")
	}
	for _, word := range []string{"ps", "TIMEDB_DSN", "PGPASSFILE"} {
		if !strings.Contains(usage, word) {
			t.Errorf("the help does not tell of %s", word)
		}
	}
}

func TestWrongUsageIsNamed(t *testing.T) {
	t.Parallel()
	const dsn, tenant = "postgresql://u:hunter2@127.0.0.1:1/db", "aaaaaaaa-0000-4000-8000-00000000000a"
	for want, args := range map[string][]string{
		"--email: expected":     {"users", "create", "-d", dsn, "-t", tenant, "-e", "nonsense"},
		"--email is required":   {"users", "create", "-d", dsn, "-t", tenant},
		"--tenant-id: expected": {"users", "create", "-d", dsn, "-t", "x", "-e", "a@example.com"},
		"-nope":                 {"users", "list", "--nope"},
		`"nope"`:                {"users", "list", "nope"},
		"unknown command":       {"nope"},
		"DATABASE_URL":          {"users", "list"},
	} {
		if code, _, stderr := runIn(nil, "", args...); code != 2 || !strings.Contains(stderr, want) {
			t.Errorf("%q: exit %d, printed %q, want 2 and %q", args, code, stderr, want)
		}
	}
}

func TestNotebookDSNShapesAreUnderstood(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	bare, _, _ := strings.Cut(dsn, "?")
	for _, shape := range []string{bare, bare + "?sslmode=prefer&application_name=notebook",
		strings.Replace(bare, "postgresql:", "postgres:", 1)} {
		mustRun(t, 0, shape, "", "create", "tables", "-y")
	}
}

func TestExitCodeOfWrongUsageIsTwo(t *testing.T) {
	t.Parallel()
	const down = "postgresql://u:p@127.0.0.1:1/db" // wrong usage is found before the database is looked for
	for _, line := range []string{
		"nonsense", "create", "users", "tables create", "users nonsense", "help nonsense", "version stray", "version --nope",
		"create tables --nope", "create tables stray", "create tables --app-role", "delete tables --with-users", "users list stray",
		"users create", "users create -e a@example.com", "users create -t " + tenantA, "users create -t nope -e a@example.com",
		"users create -t " + tenantA + "0 -e a@example.com", "users create -e= -t " + tenantA, "users create -t= -e a@example.com",
		"users create -e nonsense -t " + tenantA,
		"users list -t nope", "users deactivate", "users deactivate -e=", "users activate", "users activate -e a@example.com -t nope",
		"users regenerate-key", "api --port x", "api stray",
	} {
		mustRun(t, 2, down, "", strings.Fields(line)...)
	}
	for _, email := range []string{" ", "a@", "@example.com", "@", "a\nb@example.com", "a@example.com\x1b[2J", "a@exa\xffmple.com"} {
		mustRun(t, 2, down, "", "users", "create", "-t", tenantA, "-e", email)
	}
}

func TestHelpAndVersionNeedNoDatabase(t *testing.T) {
	t.Parallel()
	for command, flags := range map[string]string{
		"create tables": "-dsn -with-users -schema -app-role -dry-run -yes", "delete tables": "-dsn -schema -yes",
		"users create": "-dsn -tenant-id -email -q", "users list": "-dsn -tenant-id -include-inactive -json",
		"users deactivate": "-dsn -email -tenant-id -yes", "users activate": "-dsn -email -tenant-id",
		"users regenerate-key": "-dsn -email -tenant-id -q -yes",
		"api":                  "-dsn -schema -host -port -require-auth -allow-anonymous",
	} {
		for _, line := range []string{"help " + command, command + " -h", command + " --help"} {
			stdout, _ := mustRun(t, 0, "", "", strings.Fields(line)...)
			for _, name := range strings.Fields(flags) {
				if !strings.Contains(stdout, name) {
					t.Errorf("timedb %s: %s is not in the help", line, name)
				}
			}
		}
	}
	// The manual has a section on each command, with just the flags that it takes and an example that is right usage.
	manual := map[string]bool{"version": true}
	for _, section := range strings.Split(usage, "\n== ")[1:] {
		name, text, _ := strings.Cut(section, "\n")
		manual[name] = true
		i := slices.IndexFunc(commands, func(cmd command) bool { return cmd.name == name })
		if i < 0 || !strings.Contains(usage, "\n  timedb "+name+" ") {
			t.Fatalf("the manual tells of %q, or its overview does not", name)
		}
		c := &cli{command: commands[i], env: func(string) string { return "postgresql://h/d" }}
		taken, told := "", ""
		c.flags().VisitAll(func(f *flag.Flag) { taken += " -" + f.Name })
		for _, line := range strings.Split(text, "\n") {
			for _, word := range strings.Fields(line) {
				if strings.HasPrefix(strings.TrimSpace(line), "-") && strings.HasPrefix(word, "-") {
					told += " -" + strings.Trim(word, "-,")
				}
			}
			if example, is := strings.CutPrefix(line, "example: timedb "); is && (c.parse(strings.Fields(example)) != nil || c.check() != nil) {
				t.Errorf("the manual's example %q is wrong usage", line)
			}
		}
		words := strings.Fields(told)
		if slices.Sort(words); strings.Join(words, " ") != strings.TrimSpace(taken) || name != "version" && !strings.Contains(text, "\nexample: ") {
			t.Errorf("%s takes%s, the manual tells of %q", name, taken, words)
		}
	}
	for _, cmd := range commands {
		if !manual[cmd.name] {
			t.Errorf("the manual does not tell of %q", cmd.name)
		}
	}
	for _, line := range []string{"help", "-h", "--help"} {
		if stdout, _ := mustRun(t, 0, "", "", line); !strings.Contains(stdout, "users regenerate-key") {
			t.Errorf("timedb %s does not list the commands: %s", line, stdout)
		}
	}
	if stdout, _ := mustRun(t, 0, "", "", "version"); !strings.HasPrefix(stdout, "timedb ") {
		t.Errorf("timedb version prints %q", stdout)
	}
}

func TestCreateTablesMayBeRepeatedAndRunConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	together(4, func(int) {
		if code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", "create", "tables", "-y", "--with-users",
			"--app-role", appRole.name); code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
	})
	db := mustOpen(t, dsn)
	before := relations(t, db, "public")
	stdout, _ := mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users")
	if !strings.Contains(stdout, "values_table") {
		t.Errorf("it does not report what it did: %q", stdout)
	}
	if after := relations(t, db, "public"); after != before {
		t.Errorf("repeating it changed %q to %q", before, after)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
	if left := relations(t, db, "public"); left != "" {
		t.Errorf("delete tables left %q", left)
	}
	mustRun(t, 0, dsn, "", "delete", "tables", "-y")
}

func TestNewSchemaMayBeCreatedConcurrently(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	together(4, func(int) {
		if code, _, stderr := runIn(map[string]string{"TIMEDB_DSN": dsn}, "", "create", "tables", "-y", "-s", "new one"); code != 0 {
			t.Errorf("exit %d: %s", code, stderr)
		}
	})
	db := mustOpen(t, dsn)
	if relations(t, db, "new one") == "" {
		t.Error("nothing was created")
	}
	mustExec(t, db, `DROP SCHEMA public`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y") // which makes the schema anew, and nothing temporary
	if relations(t, db, "public") == "" {
		t.Error("nothing was created in public")
	}
}

func TestTablesOfAnEarlierVersionAreUpgradedInPlace(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	s := mustAPI(t, dsn)
	key := s.mustUser(t, tenantA, "a@example.com")
	s.must(t, 200, "POST", "/upload", key, runWith("", at("2025-01-01", "1")))
	before := s.must(t, 200, "GET", "/values?detail=true", key, "")
	s.stop()
	// Version 1 had no comment, another compression, and users without a grace.
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS NULL; ALTER TABLE values_table ALTER "values" SET COMPRESSION pglz;
		ALTER TABLE users_table DROP previous_digest, DROP previous_ends_at`)
	if _, errs := mustRun(t, 1, dsn, "", "api", "--port", "0"); !strings.Contains(errs, "version 1") || !strings.Contains(errs, "run timedb create tables") {
		t.Errorf("api on tables of version 1: %q", errs)
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() { mustRun(t, 0, dsn, "", "create", "tables", "-y") })
	}
	all.Wait()
	mustCreateTables(t, dsn)
	if after := mustAPI(t, dsn).must(t, 200, "GET", "/values?detail=true", key, ""); after != before {
		t.Errorf("before the upgrade %s, after it %s", before, after)
	}
	if got := mustQuery(t, s.db, `SELECT attcompression FROM pg_attribute WHERE attrelid = 'values_table'::regclass AND attname = 'values'`); got != "l" {
		t.Errorf("the compression is %q, want l of lz4", got)
	}
	mustExec(t, s.db, `COMMENT ON TABLE runs_table IS 'timedb schema 99'`)
	for _, command := range []string{"api --port 0", "create tables -y"} {
		if _, errs := mustRun(t, 1, dsn, "", strings.Fields(command)...); !strings.Contains(errs, "version 99") || !strings.Contains(errs, "the timedb that made them") {
			t.Errorf("%s on tables of a later version: %q", command, errs)
		}
	}
}

func TestCitusIsAskedForByName(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	if _, errs := mustRun(t, 1, dsn, "", "create", "tables", "--citus", "-y"); !strings.Contains(errs, "CREATE EXTENSION citus") {
		t.Errorf("without the extension: %q", errs)
	}
	if got := mustQuery(t, mustOpen(t, dsn), "SELECT count(*) FROM pg_class WHERE relname LIKE '%_table' AND relnamespace = 'public'::regnamespace"); got != "0" {
		t.Errorf("%s tables were made by a command that failed", got)
	}
}

func TestDryRunPrintsSQLThatWorks(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	script, _ := mustRun(t, 0, "", "", "create", "tables", "--dry-run", "--with-users", "--app-role", appRole.name, "-s", "dry run")
	db := mustOpen(t, dsn)
	if got := relations(t, db, "dry run"); got != "" {
		t.Fatalf("--dry-run created %q", got)
	}
	mustExec(t, db, script)
	mustExec(t, db, script)
	printed := relations(t, db, "dry run")
	mustRun(t, 0, dsn, "", "create", "tables", "-y", "--with-users", "-s", "really")
	if did := relations(t, db, "really"); did != printed || printed == "" {
		t.Errorf("--dry-run makes %q, create tables makes %q", printed, did)
	}
	s := mustAPI(t, dsn, "--schema", "dry run")
	s.must(t, 401, "GET", "/values", "", "")
}

func TestSchemaHoldsEverythingAndNothingElseIsDeleted(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	const schema = `Wind "Nord"` // needs quoting
	mustCreateTables(t, dsn, "--with-users", "--schema", schema)
	if got := relations(t, db, "public"); got != "" {
		t.Errorf("in public there is %q", got)
	}
	mustExec(t, db, `CREATE TABLE "Wind ""Nord""".mine (x int); CREATE VIEW "Wind ""Nord""".my_view AS SELECT 1 AS one`)
	s := mustAPI(t, dsn, "-s", schema)
	s.must(t, 401, "GET", "/values", "", "")
	mustCreateTables(t, dsn, "--with-users") // the same in public must survive too
	public := relations(t, db, "public")
	mustRun(t, 0, dsn, "", "delete", "tables", "-y", "-s", schema)
	if got := relations(t, db, schema); got != "mine my_view" {
		t.Errorf("after delete tables the schema holds %q", got)
	}
	if got := relations(t, db, "public"); got != public {
		t.Errorf("delete tables in a schema changed public to %q", got)
	}
}

func TestDeleteTablesRefusesToTakeForeignObjectsAlong(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustCreateTables(t, dsn, "--with-users")
	mustExec(t, db, `CREATE VIEW report AS SELECT count(*) FROM values_table`)
	before := relations(t, db, "public")
	mustRun(t, 1, dsn, "", "delete", "tables", "-y")
	if got := relations(t, db, "public"); got != before {
		t.Errorf("a view that uses values_table: %q became %q", before, got)
	}
}

func TestCreateWithoutUsersLeavesUsersTableAlone(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	mustExec(t, db, `CREATE TABLE users_table (x int)`)
	mustRun(t, 0, dsn, "", "create", "tables", "-y")
	if got := mustQuery(t, db, `SELECT string_agg(attname, ' ') FROM pg_attribute WHERE attrelid = 'users_table'::regclass AND attnum > 0`); got != "x" {
		t.Errorf("the columns of users_table became %q", got)
	}
}

func TestQuestionsAreAskedAndOnlyYesIsYes(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	db := mustOpen(t, dsn)
	user := []string{"-e", "ask@example.com"}
	for _, c := range []struct {
		args  []string
		state func() string
	}{
		{[]string{"create", "tables", "--with-users"}, func() string { return relations(t, db, "public") }},
		{append([]string{"users", "regenerate-key"}, user...), func() string { return users(t, db) }},
		{append([]string{"users", "deactivate"}, user...), func() string { return users(t, db) }},
		{[]string{"delete", "tables"}, func() string { return relations(t, db, "public") }},
	} {
		before := c.state()
		for _, answer := range []string{"", "n\n", "\n", "perhaps\n"} {
			_, stderr := mustRun(t, 1, dsn, answer, c.args...)
			if answer == "" && !strings.Contains(stderr, "-y") {
				t.Errorf("%v with nobody to ask says %q, want -y in it", c.args, stderr)
			}
			if c.state() != before {
				t.Fatalf("%v with the answer %q changed something", c.args, answer)
			}
		}
		if mustRun(t, 0, dsn, "y\n", c.args...); c.state() == before {
			t.Errorf("%v with the answer y changed nothing", c.args)
		}
		if c.args[0] == "create" {
			mustRun(t, 0, dsn, "", append([]string{"users", "create", "-t", tenantA}, user...)...)
		}
	}
}

func TestUsersCreateShowsTheKeyOnce(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "early@example.com") // no users_table yet
	mustCreateTables(t, dsn, "--with-users")
	stdout, _ := mustRun(t, 0, dsn, "", "users", "create", "--tenant-id", strings.ToUpper(tenantA), "--email", "Alice@example.com")
	found := regexp.MustCompile(`(?m)^API Key: (tdb_\S+)$`).FindStringSubmatch(stdout)
	if found == nil || !wellFormedKey(found[1]) {
		t.Fatalf("no line of the key alone: %q", stdout)
	}
	db := mustOpen(t, dsn)
	for _, want := range []string{mustQuery(t, db, `SELECT user_id FROM users_table`), tenantA, "Alice@example.com",
		"not be shown again"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("users create prints %q, want %q in it", stdout, want)
		}
	}
	_, stderr := mustRun(t, 1, dsn, "", "users", "create", "-t", tenantA, "-e", "aLICE@example.com")
	if !strings.Contains(stderr, "User with email 'aLICE@example.com' already exists for this tenant.") {
		t.Errorf("a second user of one email: %q", stderr)
	}
	quiet, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantB, "-e", "Alice@example.com")
	if !wellFormedKey(strings.TrimSuffix(quiet, "\n")) {
		t.Errorf("-q prints %q, want the key alone", quiet)
	}
	dump := mustQuery(t, db, `SELECT string_agg(u::text, ' ') FROM users_table u`) // S6
	for _, key := range []string{found[1], strings.TrimSpace(quiet)} {
		if strings.Contains(dump, key[13:]) || strings.Contains(dump, hex.EncodeToString([]byte(key[13:]))) {
			t.Errorf("users_table holds the key: %s", dump)
		}
	}
}

func TestAmbiguousOrUnknownEmailChangesNothing(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	for _, tenant := range []string{tenantA, tenantB} {
		mustRun(t, 0, dsn, "", "users", "create", "-t", tenant, "-e", "both@example.com")
	}
	db := mustOpen(t, dsn)
	before := users(t, db)
	for _, command := range []string{"deactivate -y", "activate", "regenerate-key -y"} {
		args := append([]string{"users"}, strings.Fields(command)...)
		_, stderr := mustRun(t, 1, dsn, "", append(args, "-e", "both@example.com")...)
		for _, want := range []string{tenantA, tenantB, "--tenant-id"} {
			if !strings.Contains(stderr, want) {
				t.Errorf("users %s: %q, want %s in it", command, stderr, want)
			}
		}
		mustRun(t, 1, dsn, "", append(args, "-e", "nobody@example.com")...)
		mustRun(t, 1, dsn, "", append(args, "-e", "both@example.com", "-t", nobody)...)
		if users(t, db) != before {
			t.Fatalf("users %s changed something", command)
		}
	}
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "BOTH@example.com", "-t", tenantB)
	if got := mustQuery(t, db, `SELECT tenant_id FROM users_table WHERE NOT is_active`); got != tenantB {
		t.Errorf("deactivated %q, want the user of tenant B", got)
	}
}

func TestUsersListShowsEveryUserAndNoSecret(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	var secrets []string
	for _, email := range []string{"on@example.com", "off@example.com"} {
		key, _ := mustRun(t, 0, dsn, "", "users", "create", "-q", "-t", tenantA, "-e", email)
		digest := sha256.Sum256([]byte(strings.TrimSpace(key)))
		secrets = append(secrets, key[13:50], hex.EncodeToString(digest[:]), base64.StdEncoding.EncodeToString(digest[:]))
	}
	mustRun(t, 0, dsn, "", "users", "create", "-t", tenantB, "-e", "other@example.com")
	mustRun(t, 0, dsn, "", "users", "deactivate", "-y", "-e", "off@example.com")
	db := mustOpen(t, dsn)
	ids := strings.Fields(mustQuery(t, db, `SELECT string_agg(user_id || ' ' || key_id, ' ') FROM users_table WHERE tenant_id = $1`, tenantA))
	for _, flags := range []string{"", "--json", "--include-inactive", "-t " + tenantA, "--json -t " + tenantA} {
		stdout, _ := mustRun(t, 0, dsn, "", append([]string{"users", "list"}, strings.Fields(flags)...)...)
		for _, want := range append(ids, tenantA, "on@example.com", "off@example.com") {
			if !strings.Contains(stdout, want) {
				t.Errorf("users list %s: no %q in\n%s", flags, want, stdout)
			}
		}
		for _, secret := range secrets {
			if strings.Contains(stdout, secret) {
				t.Errorf("users list %s shows a key or a digest:\n%s", flags, stdout)
			}
		}
		if strings.Contains(stdout, "other@example.com") == strings.Contains(flags, "-t") {
			t.Errorf("users list %s does not respect the tenant:\n%s", flags, stdout)
		}
		if strings.Contains(flags, "--json") {
			for _, u := range mustDecode[[]map[string]any](t, stdout) {
				if u["is_active"] != (u["email"] != "off@example.com") {
					t.Errorf("is_active is wrong: %v", u)
				}
			}
		}
	}
}

func TestAppRoleCannotRewriteAnything(t *testing.T) {
	t.Parallel()
	s := mustServer(t)
	s.mustUser(t, tenantA, "a@example.com")
	app := mustOpen(t, asAppRole(s.dsn))
	forbidden := []string{`SELECT created_at FROM users_table`, `SELECT * FROM users_table`, `DELETE FROM users_table`,
		`TRUNCATE users_table`,
		`INSERT INTO users_table (tenant_id, email, key_id, key_digest) VALUES (gen_random_uuid(), 'x', 'x', sha256('x'))`,
		`ALTER TABLE values_table ADD x int`, `DROP TABLE values_table`,
		`CREATE TRIGGER x BEFORE INSERT ON runs_table EXECUTE FUNCTION suppress_redundant_updates_trigger()`}
	columns := mustQuery(t, s.db, `SELECT string_agg(attname, ' ') FROM pg_attribute
		WHERE attrelid = 'users_table'::regclass AND attnum > 0 AND NOT attisdropped AND attname <> 'last_used_at'`)
	for _, column := range strings.Fields(columns) {
		forbidden = append(forbidden, `UPDATE users_table SET `+column+` = DEFAULT`)
	}
	for _, table := range []string{"runs_table", "series_table", "values_table"} {
		forbidden = append(forbidden, `UPDATE `+table+` SET tenant_id = tenant_id`, `DELETE FROM `+table, `TRUNCATE `+table+` CASCADE`)
	}
	for _, query := range forbidden {
		if _, err := app.Exec(query); pq.As(err) == nil || pq.As(err).Code != "42501" {
			t.Errorf("%s as the API's role: %v, want permission denied", query, err)
		}
	}
	mustExec(t, app, `UPDATE users_table SET last_used_at = now() WHERE email = 'a@example.com'`)
}

func TestAPIRefusesToStartUnsafely(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn)
	_, stderr := mustRun(t, 1, asAppRole(dsn), "", "api", "--host", "0.0.0.0", "--port", "0")
	if !strings.Contains(stderr, "--allow-anonymous") {
		t.Errorf("a network without users_table: %q", stderr)
	}
	mustRun(t, 1, "postgresql://u:p@127.0.0.1:1/db", "", "api", "--port", "0") // the database is down
	mustAPI(t, dsn, "--host", "0.0.0.0", "--allow-anonymous")
	mustCreateTables(t, dsn, "--with-users")
	// The operator is told what weakens the protection, and of nothing else.
	cert, key := mustCertificate(t)
	for args, weakness := range map[string]string{"--host 127.0.0.1": "", "--host 0.0.0.0": "plain text", "--host 0.0.0.0 --tls-cert " + cert + " --tls-key " + key: ""} {
		s := mustAPI(t, dsn, strings.Fields(args)...)
		if log := s.log.String(); strings.Contains(log, "level=WARN") != (weakness != "") || !strings.Contains(log, weakness) {
			t.Errorf("started with %s the log is %q, want %q in it", args, log, weakness)
		}
	}
	for _, grant := range []string{`UPDATE (annotation) ON values_table`, `DELETE ON runs_table`, `INSERT ON users_table`} {
		mustExec(t, mustOpen(t, dsn), `GRANT `+grant+` TO `+appRole.name)
		if s := mustAPI(t, dsn); !strings.Contains(s.log.String(), "may rewrite") {
			t.Errorf("the role has %s, and nothing is said", grant)
		}
		mustExec(t, mustOpen(t, dsn), `REVOKE `+grant+` FROM `+appRole.name)
	}
	ctx, cancel := context.WithCancel(context.Background())
	owner := func(name string) string { return map[string]string{"TIMEDB_DSN": dsn}[name] }
	var out, log logBuffer
	done := make(chan int)
	go func() { done <- run(ctx, []string{"api", "--port", "0"}, owner, strings.NewReader(""), &out, &log) }()
	for !servesLine.MatchString(out.String()) {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if code := <-done; code != 0 || !strings.Contains(log.String(), "may rewrite") { // S19
		t.Errorf("started as the tables' owner: exit %d, the log is %q", code, log.String())
	}
	mustRun(t, 2, dsn, "", "api", "--tls-cert", cert)
	mustRun(t, 1, asAppRole(dsn), "", "api", "--port", "0", "--tls-cert", key, "--tls-key", cert)
}

func TestUnverifiedConnectionsToTheDatabaseAreKnown(t *testing.T) { // S28
	t.Parallel()
	for dsn, exposed := range map[string]bool{
		"postgresql://u@127.0.0.1/d": false, "postgresql://u@localhost/d?sslmode=disable": false, "postgresql://u@[::1]/d": false, "host=/run/postgresql user=u": false,
		"postgresql://u@db.example/d?sslmode=verify-full": false, "postgresql://u@db.example/d": true, "postgresql://u@db.example/d?sslmode=require": true,
		"postgresql://u@192.0.2.1/d?sslmode=disable": true, "postgresql://u@127.0.0.1.example/d": true, "host=db.example user=u sslmode=verify-ca": true,
	} {
		st, err := openStore(dsn, "public", 0, 1)
		if err != nil || st.exposed != exposed {
			t.Errorf("%s: exposed is not %v, or %v", dsn, exposed, err)
			continue
		}
		st.db.Close()
	}
}

// mustCertificate makes a certificate of 127.0.0.1 and its key, in files.
func mustCertificate(t testing.TB) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	signed, err := x509.CreateCertificate(cryptorand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: signed}, key: {Type: "PRIVATE KEY", Bytes: encoded}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestTLSIsSpokenFromVersion12On(t *testing.T) { // S28
	t.Parallel()
	dsn := mustDatabase(t)
	mustCreateTables(t, dsn, "--with-users")
	cert, private := mustCertificate(t)
	s := mustAPI(t, dsn, "--tls-cert", cert, "--tls-key", private)
	key := s.mustUser(t, tenantA, "a@example.com")
	if !strings.HasPrefix(s.url, "https://") {
		t.Errorf("it serves %s", s.url)
	}
	trusted := x509.NewCertPool()
	if roots, err := os.ReadFile(cert); err != nil || !trusted.AppendCertsFromPEM(roots) {
		t.Fatal("the certificate cannot be read")
	}
	for version, works := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		s.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted, MinVersion: version, MaxVersion: version}}}
		resp, _, err := s.do("GET", "/list_timeseries", key, "")
		if works != (err == nil && resp.StatusCode == 200) {
			t.Errorf("%s: %v %v", tls.VersionName(version), resp, err)
		}
	}
	plain, err := http.Get(strings.Replace(s.url, "https", "http", 1) + "/values")
	if err != nil || plain.StatusCode != 400 {
		t.Errorf("plain HTTP on the same port: %v %v", plain, err)
	}
}

func TestMissingTablesAre503UntilTheyAreCreated(t *testing.T) {
	t.Parallel()
	dsn := mustDatabase(t)
	s := mustAPI(t, dsn)
	for _, c := range [][3]string{{"GET", "/values", ""}, {"GET", "/list_timeseries", ""}, {"POST", "/upload", oneValue},
		{"PUT", "/values", `{"updates":[{"series_key":"load","valid_time":"2025-01-01","value":1}]}`}, {"POST", "/series", `{"name":"x"}`}} {
		if text := s.must(t, 503, c[0], c[1], "", c[2]); strings.Contains(text, "table") {
			t.Errorf("%s %s tells of the database: %s", c[0], c[1], text)
		}
	}
	mustCreateTables(t, dsn)
	s.must(t, 200, "POST", "/upload", "", oneValue)
	s.must(t, 200, "GET", "/values", "", "")
}
